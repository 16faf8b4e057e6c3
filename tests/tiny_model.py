"""A complete Video-LLaMA of a few ten thousand random weights, and inputs for it: what the model tests run on."""

from typing import Any

import torch
from transformers import LlamaConfig

from transformers_videollama.configuration_video_llama import (
    VideoLlamaAudioConfig,
    VideoLlamaAudioQFormerConfig,
    VideoLlamaAudioVisionConfig,
    VideoLlamaConfig,
    VideoLlamaQFormerConfig,
    VideoLlamaVideoQFormerConfig,
    VideoLlamaVisionConfig,
)
from transformers_videollama.modeling_video_llama import VideoLlamaForConditionalGeneration

NUM_VIDEO_TOKENS = 4
NUM_AUDIO_TOKENS = 2
IMAGE_SIZE = 8
MEL_SHAPE = (16, 26)  # mel bins, time steps
VOCAB_SIZE = 99


def tiny_config(**kwargs: Any) -> VideoLlamaConfig:
    """
    A configuration with all three modalities, whose placeholders lie past the vocabulary, as the published ones do.
    """
    transformer = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    qformer = {**transformer, "encoder_hidden_size": 32, "vocab_size": 10, "max_position_embeddings": 8,
               "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    parts = {
        "vision_config": VideoLlamaVisionConfig(**transformer, image_size=IMAGE_SIZE, patch_size=4),
        "qformer_config": VideoLlamaQFormerConfig(**qformer),
        "video_qformer_config": VideoLlamaVideoQFormerConfig(**qformer),
        "audio_config": VideoLlamaAudioConfig(
            **transformer,
            num_mel_bins=MEL_SHAPE[0],
            max_length=MEL_SHAPE[1],
            projection_dim=16,
            max_source_positions=4,
        ),
        "audio_qformer_config": VideoLlamaAudioQFormerConfig(**{**qformer, "encoder_hidden_size": 16}),
        "audio_vision_config": VideoLlamaAudioVisionConfig(
            **transformer, image_size=IMAGE_SIZE, patch_size=4, projection_dim=16
        ),
        "text_config": LlamaConfig(
            **transformer,
            num_key_value_heads=2,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "num_query_tokens": 3,
        "num_video_query_tokens": NUM_VIDEO_TOKENS,
        "num_audio_query_tokens": NUM_AUDIO_TOKENS,
        "max_frames": 6,
        "image_token_id": VOCAB_SIZE,
        "video_token_id": VOCAB_SIZE + 1,
        "audio_token_id": VOCAB_SIZE + 2,
    }
    return VideoLlamaConfig(**{**parts, **kwargs})


def tiny_model(**kwargs: Any) -> VideoLlamaForConditionalGeneration:
    """
    A model with the weights of seed 0, large enough that its answers depend on what it is shown, which never ends an
    answer by itself.
    """
    config = tiny_config(**kwargs)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.initializer_range = 0.3
    torch.manual_seed(0)
    model = VideoLlamaForConditionalGeneration(config).eval()
    model.generation_config.update(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    return model


def prompt(*parts: int | str, seed: int = 0) -> torch.Tensor:
    """
    The token ids, of shape `(length,)`, of a prompt whose `parts` are numbers of text tokens and names of modalities:
    `prompt(3, "video", 2)`.
    """
    generator = torch.Generator().manual_seed(seed)
    media = {"image": VOCAB_SIZE, "video": VOCAB_SIZE + 1, "audio": VOCAB_SIZE + 2}
    tokens = []
    for part in parts:
        if isinstance(part, str):
            tokens += [media[part]] * (NUM_AUDIO_TOKENS if part == "audio" else NUM_VIDEO_TOKENS)
        else:
            tokens += torch.randint(3, VOCAB_SIZE, (part,), generator=generator).tolist()
    return torch.tensor(tokens)


def batch(*prompts: torch.Tensor) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of prompts of any lengths, padded on the left."""
    length = max(len(ids) for ids in prompts)
    padding = [length - len(ids) for ids in prompts]
    return {
        "input_ids": torch.stack(
            [torch.cat([torch.zeros(n).long(), ids]) for n, ids in zip(padding, prompts, strict=True)]
        ),
        "attention_mask": torch.tensor([[0] * n + [1] * (length - n) for n in padding]),
    }


def images(number: int, seed: int = 1) -> torch.Tensor:
    """`pixel_values`"""
    return torch.randn(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def videos(number: int, num_frames: int = 3, seed: int = 2) -> torch.Tensor:
    """`pixel_values_videos`"""
    return torch.randn(number, num_frames, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def sounds(number: int, num_clips: int = 2, seed: int = 3) -> torch.Tensor:
    """`input_features`"""
    return torch.randn(number, num_clips, *MEL_SHAPE, generator=torch.Generator().manual_seed(seed))
