"""Fits the library's `generate` to Video-LLaMA's media, placeholders and stop strings.

Media are encoded once, before the prefill, and only those that the cache does not hold yet; the soft tokens, not the media,
are repeated for beams and several answers.
"""

from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling

# What `generate` passes to the first forward only
MEDIA_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "padding_mask_videos",
    "input_features",
    "audio_pixel_values_videos",
    "audio_padding_mask_videos",
    "mm_encoder_outputs",
)


class VideoLlamaGenerationMixin(GenerationMixin):
    """What `generate` does differently for [`VideoLlamaForConditionalGeneration`]."""

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if input_name != "input_ids":
            return inputs, input_name, model_kwargs
        past_key_values = model_kwargs.get("past_key_values")
        past_length = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        encoded = dict(model_kwargs.get("mm_encoder_outputs") or {})
        getters = {
            "image": (self.get_image_features, {"pixel_values": "pixel_values"}),
            "video": (
                self.get_video_features,
                {"pixel_values_videos": "pixel_values_videos", "padding_mask_videos": "padding_mask_videos"},
            ),
            "audio": (
                self.get_audio_features,
                {
                    "input_features": "input_features",
                    "audio_pixel_values_videos": "pixel_values_videos",
                    "audio_padding_mask_videos": "padding_mask_videos",
                },
            ),
        }
        for modality, (getter, names) in getters.items():
            media = {
                argument: model_kwargs.pop(name)
                for name, argument in names.items()
                if model_kwargs.get(name) is not None
            }
            if not media:
                continue
            if past_length:
                uncached = self._find_uncached_media(inputs, past_length, modality)
                media = {argument: medium[uncached.to(medium.device)] for argument, medium in media.items()}
            if len(next(iter(media.values()))):
                encoded[modality] = getter(**media, return_dict=True)
        model_kwargs["mm_encoder_outputs"] = encoded
        return inputs, input_name, model_kwargs

    def _find_uncached_media(self, input_ids: torch.LongTensor, past_length: int, modality: str) -> torch.BoolTensor:
        """Which media of a batch of prompts, in reading order, lie past the part that the cache holds already."""
        is_placeholder = input_ids == getattr(self.config, f"{modality}_token_id")
        is_past = torch.arange(input_ids.shape[1], device=input_ids.device) < past_length
        first_tokens = is_past.expand_as(is_placeholder)[is_placeholder][:: self._num_soft_tokens(modality)]
        return ~first_tokens

    def _num_soft_tokens(self, modality: str) -> int:
        """Soft tokens of one medium."""
        return self.config.num_audio_query_tokens if modality == "audio" else self.config.num_video_query_tokens

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and expand_size > 1:
            for modality, outputs in encoded.items():
                is_placeholder = input_ids == getattr(self.config, f"{modality}_token_id")
                media_per_prompt = is_placeholder.sum(dim=1) // self._num_soft_tokens(modality)
                prompts = outputs.pooler_output.split(media_per_prompt.tolist())
                repeated = torch.cat([media for media in prompts for _ in range(expand_size)])
                encoded[modality] = BaseModelOutputWithPooling(pooler_output=repeated)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in MEDIA_INPUTS:
                model_inputs.pop(name, None)
        return model_inputs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        return _InVocabularyLogitsProcessorList(processors, self.config.text_config.vocab_size)

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> StoppingCriteriaList:
        # The published checkpoints stop at strings. The library finds strings with a tokenizer, which callers seldom pass;
        # without one, the family's strings are found by their token ids, as the published chat does.
        stop_strings = generation_config.stop_strings
        known = getattr(generation_config, "stop_string_token_ids", None) or {}
        if tokenizer is not None or not stop_strings or not set(_as_list(stop_strings)) <= set(known):
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs)
        generation_config.stop_strings = None
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        generation_config.stop_strings = stop_strings
        sequences = [sequence for string in _as_list(stop_strings) for sequence in known[string]]
        criteria.append(VideoLlamaStopTokensCriteria(sequences))
        return criteria


class VideoLlamaStopTokensCriteria(StoppingCriteria):
    """
    Stops a sequence that ends in one of the given token sequences.

    Args:
        sequences (`list[list[int]]`): Token ids, such as `[[835], [2277, 29937]]` for `###` in LLaMA's vocabulary.
    """

    def __init__(self, sequences: list[list[int]]):
        self.sequences = [torch.tensor(sequence) for sequence in sequences]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        is_done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for sequence in self.sequences:
            if input_ids.shape[1] >= len(sequence):
                is_done |= (input_ids[:, -len(sequence) :] == sequence.to(input_ids.device)).all(dim=1)
        return is_done


class _InVocabularyLogitsProcessorList(LogitsProcessorList):
    """
    Shows logits processors, some of which index the scores by the prompt's tokens, a prompt without tokens past the
    vocabulary. Those are placeholders; the prompt's own first token takes their place, so the set of seen tokens is kept.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int):
        super().__init__(processors)
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if len(self):
            input_ids = torch.where(input_ids < self.vocab_size, input_ids, input_ids[:, :1])
        return super().__call__(input_ids, scores, **kwargs)


def _as_list(strings: str | list[str]) -> list[str]:
    return [strings] if isinstance(strings, str) else list(strings)


__all__ = ["VideoLlamaGenerationMixin", "VideoLlamaStopTokensCriteria"]
