"""The small Video-LLaMA: the paper's parts, each a hundredth of the published size, around SmolLM2-135M-Instruct.

Frames of 64 x 64 pixels go through a ViT and a Q-Former with one query for each kind of object of the miniature world,
then through the video branch into 16 soft tokens; sound goes through a small ImageBind and the audio branch into 8.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from world import KINDS

from transformers_videollama import (
    VideoLlamaAudioConfig,
    VideoLlamaAudioVisionConfig,
    VideoLlamaConfig,
    VideoLlamaFeatureExtractor,
    VideoLlamaForConditionalGeneration,
    VideoLlamaImageProcessor,
    VideoLlamaProcessor,
    VideoLlamaQFormerConfig,
    VideoLlamaVideoProcessor,
    VideoLlamaVisionConfig,
)

IMAGE_SIZE = 64
NUM_VIDEO_TOKENS = 16
NUM_AUDIO_TOKENS = 8


def make_config(decoder: str | Path, scale: int = 1) -> VideoLlamaConfig:
    """
    The configuration of the small model around a decoder; placeholders lie past the decoder's vocabulary. A `scale` of
    2 or 4 divides widths and depths, for tests.
    """
    text_config = AutoConfig.from_pretrained(decoder)
    tower = {"hidden_size": 192 // scale, "intermediate_size": 768 // scale, "num_attention_heads": 4}
    width = 256 // scale
    qformer = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 8,
               "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    frames = {"image_size": IMAGE_SIZE, "patch_size": 8}
    joint = {"projection_dim": 128 // scale, "num_hidden_layers": 4 // scale}
    branch = {**qformer, "cross_attention_frequency": 1}
    return VideoLlamaConfig(
        vision_config=VideoLlamaVisionConfig(**tower, **frames, num_hidden_layers=4 // scale),
        qformer_config=VideoLlamaQFormerConfig(
            **qformer, num_hidden_layers=2, encoder_hidden_size=tower["hidden_size"]
        ),
        # Twice as deep as the paper's: what moves, or comes first, has to be found before it can be told.
        video_qformer_config={**branch, "num_hidden_layers": 4, "encoder_hidden_size": width},
        # Vectors of sounds and of frames have the same length, so that the audio branch takes one for the other.
        audio_config=VideoLlamaAudioConfig(**tower, **joint, patch_stride=16, logit_scale_init_value=1.0),
        audio_vision_config=VideoLlamaAudioVisionConfig(**tower, **frames, **joint),
        audio_qformer_config={**branch, "num_hidden_layers": 2, "encoder_hidden_size": joint["projection_dim"]},
        text_config=text_config,
        num_query_tokens=len(KINDS),
        num_video_query_tokens=NUM_VIDEO_TOKENS,
        num_audio_query_tokens=NUM_AUDIO_TOKENS,
        image_token_id=text_config.vocab_size,
        video_token_id=text_config.vocab_size + 1,
        audio_token_id=text_config.vocab_size + 2,
    )


def make_processor(decoder: str | Path) -> VideoLlamaProcessor:
    """The processor of the small model."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return VideoLlamaProcessor(
        image_processor=VideoLlamaImageProcessor(size=size),
        tokenizer=AutoTokenizer.from_pretrained(decoder),
        video_processor=VideoLlamaVideoProcessor(size=size, num_frames=8),
        feature_extractor=VideoLlamaFeatureExtractor(),
        chat_template="smollm2",
        num_image_tokens=NUM_VIDEO_TOKENS,
        num_video_tokens=NUM_VIDEO_TOKENS,
        num_audio_tokens=NUM_AUDIO_TOKENS,
    )


def make_model(decoder: str | Path, seed: int, scale: int = 1) -> VideoLlamaForConditionalGeneration:
    """The small model before any training: random weights around the decoder's own."""
    torch.manual_seed(seed)
    model = VideoLlamaForConditionalGeneration(make_config(decoder, scale))
    weights = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    model.model.language_model.load_state_dict(weights.model.state_dict())
    model.tie_weights()
    model.generation_config = weights.generation_config
    init_positions(model)
    return model.eval()


@torch.no_grad()
def init_positions(model: VideoLlamaForConditionalGeneration) -> None:
    """
    Starts all positions as sines of about the scale of what they are added to. The library's small random numbers
    would be lost beside it, and a short training would not learn to tell left from right and early from late.
    """
    parts = model.model
    for branch, scale in ((parts.video_branch, 1.5), (parts.audio_branch, 0.1)):
        table = branch.position_embedding.weight
        table.copy_(scale * sines(torch.arange(len(table)), table.shape[1]))
    for tower in (parts.vision_tower, parts.audio_vision_tower, parts.audio_tower):
        table = tower.embeddings.position_embedding
        config = tower.config
        size = (config.image_size,) * 2 if hasattr(config, "image_size") else (config.num_mel_bins, config.max_length)
        step = getattr(config, "patch_stride", config.patch_size)
        rows, columns = ((length - config.patch_size) // step + 1 for length in size)
        width = table.shape[2] // 2
        row, column = (
            index.flatten() for index in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        )
        table[:, 1:] = 0.5 * torch.cat(
            [sines(row, width), sines(column, width)], dim=1
        )  # the first is the class token's


def sines(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of positions (n,) at wavelengths from 6 to some hundred: (n, width)."""
    frequencies = torch.exp(torch.linspace(0, -4, width // 2))
    angles = positions[:, None] * frequencies
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
