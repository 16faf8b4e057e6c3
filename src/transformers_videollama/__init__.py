"""Video-LLaMA for Hugging Face Transformers. Importing the package registers it with the library's Auto classes.

Nothing else is imported until it is used, so that `import transformers_videollama` does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto import register

if TYPE_CHECKING:
    from .configuration_video_llama import (
        VideoLlamaAudioConfig,
        VideoLlamaAudioQFormerConfig,
        VideoLlamaAudioVisionConfig,
        VideoLlamaConfig,
        VideoLlamaQFormerConfig,
        VideoLlamaVideoQFormerConfig,
        VideoLlamaVisionConfig,
    )
    from .feature_extraction_video_llama import VideoLlamaFeatureExtractor
    from .image_processing_video_llama import VideoLlamaImageProcessor
    from .media import MediaError
    from .model_card import make_model_card
    from .modeling_video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel, VideoLlamaPreTrainedModel
    from .pipeline_video_text_to_text import VideoTextToTextPipeline
    from .processing_video_llama import VideoLlamaProcessor
    from .trained_part import from_trained_part, load_trained_part, push_trained_part_to_hub, save_trained_part
    from .video_processing_video_llama import VideoLlamaVideoProcessor

_MODULES = {
    "VideoLlamaAudioConfig": "configuration_video_llama",
    "VideoLlamaAudioQFormerConfig": "configuration_video_llama",
    "VideoLlamaAudioVisionConfig": "configuration_video_llama",
    "VideoLlamaConfig": "configuration_video_llama",
    "VideoLlamaQFormerConfig": "configuration_video_llama",
    "VideoLlamaVideoQFormerConfig": "configuration_video_llama",
    "VideoLlamaVisionConfig": "configuration_video_llama",
    "VideoLlamaFeatureExtractor": "feature_extraction_video_llama",
    "VideoLlamaImageProcessor": "image_processing_video_llama",
    "MediaError": "media",
    "make_model_card": "model_card",
    "VideoLlamaForConditionalGeneration": "modeling_video_llama",
    "VideoLlamaModel": "modeling_video_llama",
    "VideoLlamaPreTrainedModel": "modeling_video_llama",
    "VideoTextToTextPipeline": "pipeline_video_text_to_text",
    "VideoLlamaProcessor": "processing_video_llama",
    "from_trained_part": "trained_part",
    "load_trained_part": "trained_part",
    "push_trained_part_to_hub": "trained_part",
    "save_trained_part": "trained_part",
    "VideoLlamaVideoProcessor": "video_processing_video_llama",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


register()

__all__ = [
    "MediaError",
    "VideoLlamaAudioConfig",
    "VideoLlamaAudioQFormerConfig",
    "VideoLlamaAudioVisionConfig",
    "VideoLlamaConfig",
    "VideoLlamaFeatureExtractor",
    "VideoLlamaForConditionalGeneration",
    "VideoLlamaImageProcessor",
    "VideoLlamaModel",
    "VideoLlamaPreTrainedModel",
    "VideoLlamaProcessor",
    "VideoLlamaQFormerConfig",
    "VideoLlamaVideoProcessor",
    "VideoLlamaVideoQFormerConfig",
    "VideoLlamaVisionConfig",
    "VideoTextToTextPipeline",
    "from_trained_part",
    "load_trained_part",
    "make_model_card",
    "push_trained_part_to_hub",
    "save_trained_part",
]
