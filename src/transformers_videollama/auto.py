"""Makes Video-LLaMA known to `transformers`: to its Auto classes and to `pipeline`.

`transformers` imports PyTorch only when it is needed, and so does this package: an Auto class or a pipeline is told of
Video-LLaMA right after it is imported itself.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODEL_TYPE = "video_llama"
TASK = "video-text-to-text"
PACKAGE = __name__.rpartition(".")[0]
AUTO = "transformers.models.auto"

# The library's tables of the names of models, and what they name for Video-LLaMA
MODEL_NAMES = {
    "MODEL_MAPPING_NAMES": "VideoLlamaModel",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "VideoLlamaForConditionalGeneration",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "VideoLlamaForConditionalGeneration",
}
# Where the library registers a class, and the class: (module, name in it, module of this package, class)
CLASSES = (
    (f"{AUTO}.feature_extraction_auto", "AutoFeatureExtractor",
     f"{PACKAGE}.feature_extraction_video_llama", "VideoLlamaFeatureExtractor"),
    (f"{AUTO}.image_processing_auto", "AutoImageProcessor",
     f"{PACKAGE}.image_processing_video_llama", "VideoLlamaImageProcessor"),
    (f"{AUTO}.video_processing_auto", "AutoVideoProcessor",
     f"{PACKAGE}.video_processing_video_llama", "VideoLlamaVideoProcessor"),
    (f"{AUTO}.processing_auto", "AutoProcessor",
     f"{PACKAGE}.processing_video_llama", "VideoLlamaProcessor"),
    ("transformers.pipelines", "PIPELINE_REGISTRY",
     f"{PACKAGE}.pipeline_video_text_to_text", "VideoTextToTextPipeline"),
)  # fmt: skip


def register() -> None:
    """
    Registers Video-LLaMA with `transformers`. Done when the package is imported; doing it again changes nothing.

    Modules of the library are told when they are imported, or now if they are imported already. Configuration and
    models are told by name only, because the library imports its tables of them in the midst of what they are built
    on. It looks for named classes in a module of its own, `transformers.models.video_llama`, which is another name for
    this package.
    """
    if f"{AUTO}.configuration_auto" in sys.modules:
        _register_configuration_and_models()
    else:
        sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules[PACKAGE]
        _when_imported(f"{AUTO}.auto_mappings", _add_configuration_name)
        _when_imported(f"{AUTO}.modeling_auto", _add_model_names)
    for library_module, _, module, _ in CLASSES:
        _when_imported(module, _register_classes)
        _when_imported(library_module, partial(_import_and_register_classes, module))


def _add_configuration_name(auto_mappings: ModuleType) -> None:
    auto_mappings.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "VideoLlamaConfig"


def _add_model_names(modeling_auto: ModuleType) -> None:
    for table, class_name in MODEL_NAMES.items():
        getattr(modeling_auto, table)[MODEL_TYPE] = class_name


def _register_configuration_and_models() -> None:
    """Registers these classes themselves, because the library does not read its tables of names a second time."""
    configuration_auto = importlib.import_module(f"{AUTO}.configuration_auto")
    modeling_auto = importlib.import_module(f"{AUTO}.modeling_auto")
    config_class = importlib.import_module(f"{PACKAGE}.configuration_video_llama").VideoLlamaConfig
    models = importlib.import_module(f"{PACKAGE}.modeling_video_llama")
    configuration_auto.AutoConfig.register(MODEL_TYPE, config_class, exist_ok=True)
    modeling_auto.AutoModel.register(config_class, models.VideoLlamaModel, exist_ok=True)
    for auto_class in (modeling_auto.AutoModelForImageTextToText, modeling_auto.AutoModelForMultimodalLM):
        auto_class.register(config_class, models.VideoLlamaForConditionalGeneration, exist_ok=True)
    # Pipelines look here for the models that they support
    _add_model_names(modeling_auto)


def _import_and_register_classes(name: str, _: ModuleType) -> None:
    _register_classes(importlib.import_module(name))


def _register_classes(_: ModuleType) -> None:
    """Registers the classes that are imported with the modules of the library that are imported."""
    for library_module, name, module, class_name in CLASSES:
        registry = getattr(sys.modules.get(library_module), name, None)
        # A class is missing while its module is being imported, after which this function is called again
        own_class = getattr(sys.modules.get(module), class_name, None)
        if registry is None or own_class is None:
            continue
        if name != "PIPELINE_REGISTRY":
            config_class = importlib.import_module(f"{PACKAGE}.configuration_video_llama").VideoLlamaConfig
            # Images have one class whatever backend is asked for; the library warns where one of the two is missing
            backends = (own_class, own_class) if name == "AutoImageProcessor" else (own_class,)
            registry.register(config_class, *backends, exist_ok=True)
        elif TASK not in registry.supported_tasks:
            models = importlib.import_module(f"{AUTO}.modeling_auto")
            registry.register_pipeline(
                TASK, pipeline_class=own_class, pt_model=models.AutoModelForImageTextToText, type="multimodal"
            )


def _when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Runs an action on a module: now if it is imported already, else right after it is."""
    if name in sys.modules:
        action(sys.modules[name])
        return
    watcher = next((finder for finder in sys.meta_path if isinstance(finder, _ImportWatcher)), None)
    if watcher is None:
        watcher = _ImportWatcher()
        sys.meta_path.insert(0, watcher)
    watcher.actions[name] = action


class _ImportWatcher(MetaPathFinder):
    """Finds modules as Python does by itself, and runs an action on each of some modules right after its import."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.actions.pop(fullname)(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


__all__ = ["MODEL_TYPE", "TASK", "register"]
