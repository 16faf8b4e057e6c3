"""Video-LLaMA as vLLM runs it: this package's model in vLLM's Transformers backend, and what that cannot know of it.

Imports vLLM, which only `vllm_plugin` has a use for.
"""

from functools import cached_property
from typing import Any

from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}


class VideoLlamaProcessingInfo(MultiModalProcessingInfo):
    """What the backend reads off a processor, where the model knows better."""

    @cached_property
    def _is_audio_model(self) -> bool:
        # The processor of a model that cannot hear still has a feature extractor
        return self.get_hf_config().audio_config is not None

    def get_max_audio_tokens(self) -> int:
        return self.get_hf_config().num_audio_query_tokens


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=VideoLlamaProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class VideoLlamaForVllm(TransformersMultiModalForCausalLM):
    """The backend's model, with placeholders that may lie past the vocabulary."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        token_ids = [getattr(self.config, f"{modality}_token_id") for modality in PLACEHOLDERS]
        self.configure_mm_token_handling(self.text_config.vocab_size, token_ids)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a medium in a prompt, for chats whose template does not write it."""
        return PLACEHOLDERS.get(modality.removesuffix("_embeds"))


__all__ = ["VideoLlamaForVllm"]
