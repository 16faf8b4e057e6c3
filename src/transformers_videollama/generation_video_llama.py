"""Fits the library's `generate` to Video-LLaMA's media, placeholders and stop strings.

Media are encoded once, before the prefill, and only those that the cache does not hold yet; the soft tokens, not the
media, are repeated for beams and several answers.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    __version__,
)
from transformers.cache_utils import Cache
from transformers.generation import (
    CandidateGenerator,
    PromptLookupCandidateGenerator,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import utils as generation_utils
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils.deprecation import deprecate_kwarg

# What the library calls the decoder's cache: `cache` since 5.24, `past_key_values` before
CACHE_NAME = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"


def takes_either_cache_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a `forward`: where the library warns of the cache's old name, ours does, too."""
    return (
        deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward) if CACHE_NAME == "cache" else forward
    )


# Per modality, what `forward` calls its inputs, and what the modality's feature getter calls them
MEDIA_INPUTS = {
    "image": {"pixel_values": "pixel_values", "image_frame_features": "frame_features"},
    "video": {
        "pixel_values_videos": "pixel_values_videos",
        "padding_mask_videos": "padding_mask_videos",
        "video_frame_features": "frame_features",
    },
    "audio": {
        "input_features": "input_features",
        "audio_pixel_values_videos": "pixel_values_videos",
        "audio_padding_mask_videos": "padding_mask_videos",
        "audio_clip_features": "clip_features",
    },
}
MODALITIES = tuple(MEDIA_INPUTS)
# What only the first forward of `generate` is given
PREFILL_INPUTS = ("mm_encoder_outputs", *(name for names in MEDIA_INPUTS.values() for name in names))


def check_soft_token_count(modality: str, num_placeholders: int, num_soft_tokens: int) -> None:
    """Refuses a prompt whose placeholders are not as many as the soft tokens of its media; names both counts."""
    if num_placeholders != num_soft_tokens:
        hint = (
            f"no {modality} was passed"
            if num_soft_tokens == 0
            else "put one placeholder for every soft token, as the processor does"
        )
        raise ValueError(
            f"The prompt has {num_placeholders} {modality} placeholder tokens, but the {modality} input gives "
            f"{num_soft_tokens} soft tokens: {hint}."
        )


class VideoLlamaGenerationMixin(GenerationMixin):
    """What `generate` does differently for [`VideoLlamaForConditionalGeneration`]."""

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if input_name != "input_ids":
            return inputs, input_name, model_kwargs
        encoded = dict(model_kwargs.get("mm_encoder_outputs") or {})
        for modality, names in MEDIA_INPUTS.items():
            media = {argument: model_kwargs.pop(name, None) for name, argument in names.items()}
            media = {argument: medium for argument, medium in media.items() if medium is not None}
            if not media:
                continue
            if encoded.get(modality) is not None:
                raise ValueError(f"Give the {modality} input either itself or in `mm_encoder_outputs`, not both.")
            num_media = len(next(iter(media.values())))
            is_uncached = self._find_uncached_placeholders(inputs, modality, model_kwargs)
            num_uncached = int(is_uncached.sum()) // self._num_soft_tokens(modality)
            is_placeholder = inputs == self._placeholder_id(modality)
            if num_media > num_uncached and (is_placeholder & ~is_uncached).any():
                # The media of the whole conversation were passed again: those of earlier turns are in the cache.
                is_new = is_uncached[is_placeholder][:: self._num_soft_tokens(modality)]
                if len(is_new) == num_media:
                    media = {argument: medium[is_new.to(medium.device)] for argument, medium in media.items()}
                    num_media = num_uncached
            check_soft_token_count(modality, int(is_uncached.sum()), num_media * self._num_soft_tokens(modality))
            if num_media:
                encoded[modality] = getattr(self, f"get_{modality}_features")(**media, return_dict=True)
        model_kwargs["mm_encoder_outputs"] = encoded
        return inputs, input_name, model_kwargs

    def _find_uncached_placeholders(
        self, input_ids: torch.LongTensor, modality: str, model_kwargs: dict[str, Any]
    ) -> torch.BoolTensor:
        """
        Placeholders of a modality that lie past what the cache holds: a mask of the shape of `input_ids`, which may be
        the whole conversation, or its new part alone with an attention mask for all of it.
        """
        cache, attention_mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        past_length = int(cache.get_seq_length()) if cache is not None else 0
        length = input_ids.shape[1]
        offset = attention_mask.shape[1] - length if attention_mask is not None else 0
        positions = torch.arange(offset, offset + length, device=input_ids.device)
        return (input_ids == self._placeholder_id(modality)) & (positions >= past_length)

    def _placeholder_id(self, modality: str) -> int:
        return getattr(self.config, f"{modality}_token_id")

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
                placeholders = self._find_uncached_placeholders(input_ids, modality, model_kwargs).sum(dim=1)
                media_per_prompt = placeholders // self._num_soft_tokens(modality)
                prompts = outputs.pooler_output.split(media_per_prompt.tolist())
                repeated = torch.cat([media for media in prompts for _ in range(expand_size)])
                encoded[modality] = BaseModelOutputWithPooling(pooler_output=repeated)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = past_key_values if cache is None else cache
        # An assistant model's prefill is not announced as a first iteration: its cache, never a static one, is empty.
        is_assistant_prefill = cache is not None and not cache.is_compileable and not cache.get_seq_length()
        is_first_iteration = is_first_iteration or is_assistant_prefill
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            **{CACHE_NAME: cache},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in PREFILL_INPUTS:
                model_inputs.pop(name, None)
        return model_inputs

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if (
            generation_config.prefill_chunk_size is not None
            and model_kwargs.get("mm_encoder_outputs")
            and not hasattr(generation_utils, "_slice_mm_encoder_output")
        ):
            raise ValueError(
                f"transformers {__version__} cannot cut a prompt with media into chunks: leave `prefill_chunk_size` "
                "out, or use a newer release."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _get_candidate_generator(
        self,
        generation_config: GenerationConfig,
        input_ids: torch.LongTensor,
        *args: Any,
        assistant_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> CandidateGenerator:
        if assistant_model is not None and assistant_model.config.model_type != self.config.model_type:
            placeholders = sum(int((input_ids == self._placeholder_id(modality)).sum()) for modality in MODALITIES)
            if placeholders:
                raise ValueError(
                    f"A {assistant_model.config.model_type} assistant cannot see or hear, but the prompt has "
                    f"{placeholders} placeholder tokens: use an assistant of type {self.config.model_type}, or none."
                )
        generator = super()._get_candidate_generator(
            generation_config, input_ids, *args, assistant_model=assistant_model, **kwargs
        )
        if isinstance(generator, PromptLookupCandidateGenerator):
            return _InVocabularyCandidateGenerator(generator, self.config.text_config.vocab_size)
        return generator

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        vocab_size = self.config.text_config.vocab_size
        if kwargs.get("encoder_input_ids") is not None:
            kwargs["encoder_input_ids"] = _keep_in_vocabulary(kwargs["encoder_input_ids"], vocab_size)
        return _InVocabularyLogitsProcessorList(super()._get_logits_processor(*args, **kwargs), vocab_size)

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> StoppingCriteriaList:
        # The published checkpoints stop at strings. The library finds strings with a tokenizer, which callers seldom
        # pass; without one, the family's strings are found by their token ids, as the published chat does.
        stop_strings = generation_config.stop_strings
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        known: dict[str, list[list[int]]] = {}
        for config in (self.generation_config, generation_config):  # a caller's configuration need not repeat them
            known.update(getattr(config, "stop_string_token_ids", None) or {})
        if tokenizer is not None or not strings or not set(strings) <= set(known):
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs)
        generation_config.stop_strings = None
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        generation_config.stop_strings = stop_strings
        criteria.append(VideoLlamaStopTokensCriteria([sequence for string in strings for sequence in known[string]]))
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
        # Copied to the device once, not at every token
        self.sequences = [sequence.to(input_ids.device) for sequence in self.sequences]
        is_done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for sequence in self.sequences:
            if input_ids.shape[1] >= len(sequence):
                is_done |= (input_ids[:, -len(sequence) :] == sequence).all(dim=1)
        return is_done


class _InVocabularyLogitsProcessorList(LogitsProcessorList):
    """
    Shows logits processors, some of which index the scores by the prompt's tokens, no tokens past the vocabulary.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int):
        super().__init__(processors)
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if len(self):
            input_ids = _keep_in_vocabulary(input_ids, self.vocab_size)
        return super().__call__(input_ids, scores, **kwargs)


class _InVocabularyCandidateGenerator(CandidateGenerator):
    """Candidates out of the prompt itself, in which there are no tokens past the vocabulary to be found."""

    def __init__(self, generator: PromptLookupCandidateGenerator, vocab_size: int):
        self.generator = generator
        self.vocab_size = vocab_size

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.LongTensor, torch.Tensor]:
        known = _keep_in_vocabulary(input_ids, self.vocab_size)
        candidates, scores = self.generator.get_candidates(known, **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), scores

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
        self.generator.update_candidate_strategy(*args, **kwargs)


def _keep_in_vocabulary(input_ids: torch.LongTensor, vocab_size: int) -> torch.LongTensor:
    """
    Puts another token of the same prompt in place of placeholders past the vocabulary, so that the prompt still has
    the same known tokens. The one with the largest id: the smallest may be padding.
    """
    is_known = input_ids < vocab_size
    stand_in = input_ids.masked_fill(~is_known, 0).amax(dim=1, keepdim=True)
    return torch.where(is_known, input_ids, stand_in)


__all__ = ["VideoLlamaGenerationMixin", "VideoLlamaStopTokensCriteria"]
