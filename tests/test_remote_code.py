"""A saved folder works without the package, by its own files and `trust_remote_code=True`, and with it, without
that."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub
from tiny_model import tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import transformers_videollama
from transformers_videollama import (
    VideoLlamaConfig,
    VideoLlamaFeatureExtractor,
    VideoLlamaForConditionalGeneration,
    VideoLlamaModel,
    VideoLlamaVideoProcessor,
)

SYNTH = Path(__file__).parent / "reference" / "synth"
SOURCE = Path(transformers_videollama.__file__).parent
TASK = "video-text-to-text"

WITHOUT_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers_videollama":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import json, torch
torch.set_num_threads(1)
"""


def start(code: str, *args: Any, tmp_path: Path, package: bool = False, **environment: str) -> "subprocess.Popen[str]":
    """A new process with an empty home and cache, and without the package, that runs the code."""
    path = os.pathsep.join([str(SOURCE.parent)]) if package else ""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "home" / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": path,
        **({"HF_HUB_OFFLINE": "1"} if "HF_ENDPOINT" not in environment else {}),
        **environment,
    }
    tmp_path.mkdir(exist_ok=True)
    script = ("" if package else WITHOUT_PACKAGE) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )


def run(code: str, *args: Any, tmp_path: Path, package: bool = False, **environment: str) -> Any:
    """What such a process prints last: JSON."""
    process = start(code, *args, tmp_path=tmp_path, package=package, **environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.splitlines()[-1]) if output.strip() else {}


USE = """
from transformers import (AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoModelForImageTextToText,
    AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, AutoVideoProcessor, pipeline)

folder, clip, saved_to = sys.argv[1:4]
trust = {"trust_remote_code": True}
names = {}
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
             AutoVideoProcessor, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer):
    thing = auto.from_pretrained(folder, **trust)
    names[auto.__name__] = type(thing).__name__
    if auto in (AutoModel, AutoModelForImageTextToText):
        again = auto.from_config(thing.config, **trust)
        assert type(again).__name__ == type(thing).__name__
greedy = {"do_sample": False, "max_new_tokens": 8, "return_tensors": True}
pipe = pipeline("video-text-to-text", model=folder, device="cpu", **trust)
tokens = pipe(clip, text="What is shown?", **greedy)[0]["generated_token_ids"].tolist()
inferred = type(pipeline(model=folder, device="cpu", **trust)).__name__
chat = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "What is shown?"}]}]
other = pipeline("any-to-any", model=folder, device="cpu", **trust)
other_tokens = other(text=chat, generate_kwargs={"do_sample": False, "max_new_tokens": 8}, return_tensors=True)
pipe.model.save_pretrained(saved_to)
pipe.processor.save_pretrained(saved_to)
assert not [name for name in sys.modules if name.partition(".")[0] == "transformers_videollama"]
print(json.dumps({"names": names, "tokens": tokens, "inferred": inferred,
                  "other_tokens": other_tokens[0]["generated_token_ids"].tolist()}))
"""


def test_a_folder_works_without_the_package_and_so_does_what_is_saved_from_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 8, "return_tensors": True}
    here = pipeline(TASK, model=str(tiny_folder), device="cpu")
    expected = here(str(SYNTH / "clip.mp4"), text="What is shown?", **greedy)[0]["generated_token_ids"].tolist()
    folder = tiny_folder
    for generation in ("second", "third"):
        saved_to = tmp_path / generation
        result = run(USE, folder, SYNTH / "clip.mp4", saved_to, tmp_path=tmp_path)
        assert result["names"] == {
            "AutoConfig": "VideoLlamaConfig",
            "AutoModel": "VideoLlamaModel",
            "AutoModelForImageTextToText": "VideoLlamaForConditionalGeneration",
            "AutoModelForMultimodalLM": "VideoLlamaForConditionalGeneration",
            "AutoProcessor": "VideoLlamaProcessor",
            "AutoVideoProcessor": "VideoLlamaVideoProcessor",
            "AutoFeatureExtractor": "VideoLlamaFeatureExtractor",
            "AutoImageProcessor": "VideoLlamaImageProcessor",
            "AutoTokenizer": result["names"]["AutoTokenizer"],
        }
        assert result["tokens"] == result["other_tokens"] == expected
        assert result["inferred"] == "VideoTextToTextPipeline"
        check_self_contained(saved_to)
        folder = saved_to


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
def test_with_the_package_the_same_folder_asks_for_no_trust(tiny_folder: Path, trust: dict[str, bool]) -> None:
    assert TASK in json.loads((tiny_folder / "config.json").read_text())["custom_pipelines"]
    folder = str(tiny_folder)
    config = AutoConfig.from_pretrained(folder, **trust)
    assert type(config) is VideoLlamaConfig
    assert type(AutoModel.from_pretrained(folder, **trust)) is VideoLlamaModel
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(folder, **trust)) is VideoLlamaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder, **trust)) is transformers_videollama.VideoLlamaProcessor
    pipe = pipeline(TASK, model=folder, device="cpu", **trust)
    assert type(pipe) is transformers_videollama.VideoTextToTextPipeline
    for task in ("any-to-any", "image-text-to-text"):
        assert pipeline(task, model=folder, device="cpu", **trust).task == task


def test_other_custom_pipelines_of_a_configuration_are_kept() -> None:
    other = {"my-task": {"impl": "my_module.MyPipeline", "pt": ["AutoModel"]}}
    config = VideoLlamaConfig.from_dict({**tiny_config().to_dict(), "custom_pipelines": other})
    assert config.custom_pipelines == other
    assert set(config.to_dict()["custom_pipelines"]) == {"my-task", TASK}


def check_self_contained(folder: Path) -> None:
    """Whatever a folder's JSON files have the library load from its files can be loaded from them alone."""

    def references(value: Any) -> list[str]:
        if not isinstance(value, dict):
            return [reference for item in value for reference in references(item)] if isinstance(value, list) else []
        own = list(value.get("auto_map", {}).values())
        own += [info["impl"] for info in value.get("custom_pipelines", {}).values()]
        return own + [reference for item in value.values() for reference in references(item)]

    found = {reference for path in folder.glob("*.json") for reference in references(json.loads(path.read_text()))}
    assert found
    for reference in found:
        assert "--" not in reference
        module, class_name = reference.split(".")
        path = folder / f"{module}.py"
        assert path.is_file(), f"{reference} is not in {folder}"
        assert f"class {class_name}(" in path.read_text()
        for needed in get_relative_import_files(path):
            assert Path(needed).is_file(), f"{path.name} needs {Path(needed).name}"


def test_whatever_is_saved_is_self_contained(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_config()
    things = {
        "config": config,
        "model": VideoLlamaForConditionalGeneration(config),
        "base_model": VideoLlamaModel(config),
        "processor": AutoProcessor.from_pretrained(tiny_folder),
        "video_processor": VideoLlamaVideoProcessor(),
        "feature_extractor": VideoLlamaFeatureExtractor(),
    }
    for name, thing in things.items():
        thing.save_pretrained(tmp_path / name)
        check_self_contained(tmp_path / name)


def travelling_files() -> list[Path]:
    files = set()
    for name in ("configuration_video_llama", "processing_video_llama", "video_processing_video_llama"):
        path = SOURCE / f"{name}.py"
        files |= {path, *map(Path, get_relative_import_files(path))}
    return sorted(files)


def test_the_travelling_files_are_those_that_are_meant_to() -> None:
    names = {path.name for path in travelling_files()}
    assert {"modeling_video_llama.py", "pipeline_video_text_to_text.py", "media.py", "chat_templates.py"} <= names
    assert not names & {"__init__.py", "auto.py", "trained_part.py"}


@pytest.mark.parametrize("path", travelling_files(), ids=lambda path: path.stem)
def test_travelling_files_need_only_each_other_and_dependencies(path: Path) -> None:
    project = (SOURCE.parents[1] / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL).group(1)
    # Those without a condition, such as a kind of processor
    everywhere = set(re.findall(r'^    "([a-z_]+)[^;"]*",$', dependencies, re.MULTILINE))
    modules = {"pillow": "PIL"}
    # `transformers` and `librosa` bring the other three
    allowed = {modules.get(name, name) for name in everywhere} | {"numpy", "tokenizers", "soxr"}
    needed = set(get_imports(path)) - set(sys.stdlib_module_names)
    assert needed <= allowed, f"{path.name} imports {needed - allowed} where `trust_remote_code` needs it installed"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module


def test_importing_the_package_imports_nothing_else(tmp_path: Path) -> None:
    code = """
    import json, sys
    import transformers
    before = set(sys.modules)
    import transformers_videollama
    added = sorted(set(sys.modules) - before)
    heavy = {"torch", "av", "decord", "librosa", "gradio", "uvicorn"}
    print(json.dumps({"heavy": sorted(heavy & set(sys.modules)), "added": added}))
    """
    result = run(code, tmp_path=tmp_path, package=True)
    assert not result["heavy"]
    own = {"transformers_videollama", "transformers_videollama.auto", "transformers.models.video_llama"}
    assert set(result["added"]) == own


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("", "from transformers.models.llama import modeling_llama"),
        ("", "from transformers_videollama import VideoTextToTextPipeline"),
        ("", "from transformers_videollama.modeling_video_llama import VideoLlamaModel"),
        ("import transformers.pipelines", ""),
        ("from transformers import PreTrainedModel", "from transformers import Trainer"),
    ],
)
def test_it_is_registered_whatever_is_imported_first(before: str, after: str, tmp_path: Path) -> None:
    code = f"""
    import json
    {before}
    import transformers_videollama
    {after}
    import transformers, transformers_videollama.auto
    transformers_videollama.auto.register()
    from transformers.pipelines import PIPELINE_REGISTRY
    config = transformers.AutoConfig.for_model("video_llama")
    mappings = [transformers.MODEL_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
                transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING, transformers.PROCESSOR_MAPPING]
    names = [mapping[type(config)].__name__ for mapping in mappings]
    print(json.dumps({{"names": names, "tasks": PIPELINE_REGISTRY.get_supported_tasks(),
                      "module": type(config).__module__}}))
    """
    result = run(code, tmp_path=tmp_path, package=True)
    models = ["VideoLlamaModel"] + ["VideoLlamaForConditionalGeneration"] * 2
    assert result["names"] == [*models, "VideoLlamaProcessor"]
    assert TASK in result["tasks"]
    assert result["module"] == "transformers_videollama.configuration_video_llama"


def test_a_repository_works_without_the_package(tiny_folder: Path, tmp_path: Path) -> None:
    """As a folder does, by the library's other way of loading code. What is saved again does not refer to it."""
    with LocalHub() as hub:
        files = {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.is_file()}
        card = transformers_videollama.make_model_card(AutoConfig.from_pretrained(tiny_folder), "me/tiny")
        hub.create("me/tiny", {**files, "README.md": str(card).encode()})
        saved_to = tmp_path / "saved"
        result = run(USE, "me/tiny", SYNTH / "clip.mp4", saved_to, tmp_path=tmp_path, **hub.environment)
    assert result["inferred"] == "VideoTextToTextPipeline"
    assert result["tokens"] == result["other_tokens"]
    check_self_contained(saved_to)
