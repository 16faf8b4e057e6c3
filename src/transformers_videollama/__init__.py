"""Video-LLaMA for Hugging Face Transformers. Importing the package registers it with the library's Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from .configuration_video_llama import VideoLlamaConfig
from .modeling_video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel

AutoConfig.register("video_llama", VideoLlamaConfig)
AutoModel.register(VideoLlamaConfig, VideoLlamaModel)
AutoModelForImageTextToText.register(VideoLlamaConfig, VideoLlamaForConditionalGeneration)
AutoModelForMultimodalLM.register(VideoLlamaConfig, VideoLlamaForConditionalGeneration)

__all__ = ["VideoLlamaConfig", "VideoLlamaForConditionalGeneration", "VideoLlamaModel"]
