"""lmms-eval's plugin: tells lmms-eval of the model `video_llama`, for all the benchmarks that it knows.

lmms-eval calls `manifests` by the entry point `video_llama` of its group `lmms_eval.models` (`pyproject.toml`). Where
the package is not installed, `LMMS_EVAL_PLUGINS=transformers_videollama.lmms_eval_plugin` does the same: lmms-eval
then reads `models` and asks where `tasks` is. See `docs/evaluation.md`.
"""

from typing import TYPE_CHECKING

from .models import AVAILABLE_MODELS

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> "list[ModelManifest]":
    """The models of this plugin, as lmms-eval registers them: by name only."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id=name, simple_class_path=f"{__name__}.models.{name}.{class_name}")
        for name, class_name in AVAILABLE_MODELS.items()
    ]


__all__ = ["manifests"]
