"""The frozen encoders of Video-LLaMA: EVA-CLIP's ViT-g for frames, ImageBind's audio tower for sound and its vision
tower.

All three are pre-norm transformers over patches with a class token and learned absolute positions; they differ in how
they cut patches, in their attention and in what they return. See `modeling_video_llama.py` for how they are put
together.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_video_llama import VideoLlamaAudioConfig, VideoLlamaAudioVisionConfig, VideoLlamaVisionConfig


class VideoLlamaFloat32LayerNorm(nn.LayerNorm):
    """
    A layer norm computed in float32 whatever the dtype of its input and weights, as the published `ln_vision` is. It
    ends every tower, where the features leave it. Its weights are made in float32 whatever the default dtype.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, dtype=torch.float32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalized = F.layer_norm(
            hidden_states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normalized.to(hidden_states.dtype)


class VideoLlamaVisionAttention(CLIPAttention):
    """Self-attention of EVA-CLIP's ViT, whose keys have no bias."""

    def __init__(self, config: VideoLlamaVisionConfig):
        super().__init__(config)
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=False)


class VideoLlamaVisionEncoderLayer(CLIPEncoderLayer):
    """One pre-norm block of EVA-CLIP's ViT."""

    def __init__(self, config: VideoLlamaVisionConfig):
        super().__init__(config)
        self.self_attn = VideoLlamaVisionAttention(config)


class VideoLlamaAudioAttention(CLIPAttention):
    """Self-attention of ImageBind's audio tower: one learned key and value are appended to every sequence."""

    def __init__(self, config: VideoLlamaAudioConfig):
        super().__init__(config)
        self.bias_k = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.bias_v = nn.Parameter(torch.zeros(1, 1, self.embed_dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, sequence_length, _ = hidden_states.shape
        queries = self.q_proj(hidden_states).view(batch_size, sequence_length, -1, self.head_dim)
        keys = self._project_and_append(hidden_states, self.k_proj, self.bias_k)
        values = self._project_and_append(hidden_states, self.v_proj, self.bias_v)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attention_mask,
            scaling=self.scale,
            dropout=0.0 if not self.training else self.dropout,
            **kwargs,
        )
        attn_output = attn_output.reshape(batch_size, sequence_length, -1).contiguous()
        return self.out_proj(attn_output), attn_weights

    def _project_and_append(
        self, hidden_states: torch.Tensor, projection: nn.Linear, learned: torch.Tensor
    ) -> torch.Tensor:
        """Keys or values, the learned one last: `(batch_size, sequence_length + 1, num_heads, head_dim)`."""
        # Not in `forward`, whose projections vLLM merges and shares out over GPUs by heads, but not the learned ones
        batch_size = hidden_states.shape[0]
        projected = torch.cat([projection(hidden_states), learned.expand(batch_size, -1, -1)], dim=1)
        return projected.view(batch_size, -1, self.num_heads, self.head_dim)


class VideoLlamaAudioEncoderLayer(CLIPEncoderLayer):
    """One pre-norm block of ImageBind's audio tower."""

    def __init__(self, config: VideoLlamaAudioConfig):
        super().__init__(config)
        self.self_attn = VideoLlamaAudioAttention(config)


class VideoLlamaEncoder(nn.Module):
    """A stack of transformer blocks of one class: the trunk of all three towers."""

    def __init__(self, config: PreTrainedConfig, layer_class: type[CLIPEncoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, **kwargs)
        return hidden_states


class VideoLlamaPatchEmbeddings(nn.Module):
    """
    Patches of frames or spectrograms, with a class token in front and learned absolute positions.

    Args:
        patch_embedding (`nn.Module`): The convolution that cuts and projects patches.
        hidden_size (`int`): Width of the result.
        num_patches (`int`): Patches of one input.
        layer_norm (`bool`, *optional*, defaults to `False`):
            Whether patches are normalised before the class token joins.
    """

    def __init__(self, patch_embedding: nn.Module, hidden_size: int, num_patches: int, layer_norm: bool = False):
        super().__init__()
        self.patch_embedding = patch_embedding
        self.layernorm = nn.LayerNorm(hidden_size, eps=1e-5) if layer_norm else nn.Identity()
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, num_patches + 1, hidden_size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(inputs.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        patches = self.layernorm(patches)
        class_embedding = self.class_embedding.expand(patches.shape[0], -1, -1)
        return torch.cat([class_embedding, patches], dim=1) + self.position_embedding


class VideoLlamaTower(PreTrainedModel):
    """What the three encoders have in common."""

    supports_gradient_checkpointing = True
    _no_split_modules = [
        "CLIPEncoderLayer",
        "VideoLlamaVisionEncoderLayer",
        "VideoLlamaAudioEncoderLayer",
        "VideoLlamaPatchEmbeddings",
    ]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The published `ln_vision` is float32
    _keep_in_fp32_modules_strict = ["post_layernorm"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VideoLlamaPatchEmbeddings):
            init.normal_(module.class_embedding, mean=0.0, std=std)
            init.normal_(module.position_embedding, mean=0.0, std=std)
        elif isinstance(module, VideoLlamaAudioAttention):
            init.normal_(module.bias_k, mean=0.0, std=std)
            init.normal_(module.bias_v, mean=0.0, std=std)
        elif isinstance(module, VideoLlamaAudioModel):
            init.constant_(module.logit_scale, math.log(module.config.logit_scale_init_value))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings


class VideoLlamaVisionModel(VideoLlamaTower):
    """The frame encoder: EVA-CLIP's ViT-g/14 up to its last but one block, then BLIP-2's layer norm."""

    config: VideoLlamaVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": VideoLlamaVisionEncoderLayer, "attentions": VideoLlamaVisionAttention}

    def __init__(self, config: VideoLlamaVisionConfig):
        super().__init__(config)
        patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.embeddings = VideoLlamaPatchEmbeddings(patch_embedding, config.hidden_size, config.num_patches)
        self.encoder = VideoLlamaEncoder(config, VideoLlamaVisionEncoderLayer)
        self.post_layernorm = VideoLlamaFloat32LayerNorm(config.hidden_size, eps=config.post_layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_frames, 3, image_size, image_size)`): Normalised frames.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(num_frames, 1 + num_patches, hidden_size)`, after the
            layer norm; `hidden_states[-1]`, with `output_hidden_states=True`, is the state before it.
        """
        hidden_states = self.encoder(self.embeddings(pixel_values), **kwargs)
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden_states))


class VideoLlamaAudioModel(VideoLlamaTower):
    """The sound encoder: ImageBind's audio tower, one vector a clip, normalised and scaled."""

    config: VideoLlamaAudioConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)
    # 20 = exp(logit_scale) is not 20 if its logarithm is rounded
    _keep_in_fp32_modules_strict = ["post_layernorm", "logit_scale"]
    _can_record_outputs = {"hidden_states": VideoLlamaAudioEncoderLayer, "attentions": VideoLlamaAudioAttention}

    def __init__(self, config: VideoLlamaAudioConfig):
        super().__init__(config)
        patch_embedding = nn.Conv2d(
            1, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_stride, bias=False
        )
        self.embeddings = VideoLlamaPatchEmbeddings(
            patch_embedding, config.hidden_size, config.num_patches, layer_norm=True
        )
        self.encoder = VideoLlamaEncoder(config, VideoLlamaAudioEncoderLayer)
        self.post_layernorm = VideoLlamaFloat32LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale_init_value), dtype=torch.float32))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, input_features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(num_clips, num_mel_bins, max_length)`): Normalised log-mel clips.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(num_clips, 1 + num_patches, hidden_size)`, and
            `pooler_output` of shape `(num_clips, projection_dim)`, of length `exp(logit_scale)`, which is 20.
        """
        hidden_states = self.encoder(self.embeddings(input_features.unsqueeze(1)), **kwargs)
        pooled = self.projection(self.post_layernorm(hidden_states[:, 0]))
        # In float32: at length 20 a rounded scale or norm would shift every component.
        pooled = F.normalize(pooled.float(), dim=-1) * self.logit_scale.float().exp().clamp(max=100.0)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=pooled.to(hidden_states.dtype)
        )


class VideoLlamaAudioVisionModel(VideoLlamaTower):
    """ImageBind's vision tower, through which the audio branch is shown frames while it trains: one vector a frame."""

    config: VideoLlamaAudioVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": CLIPEncoderLayer, "attentions": CLIPAttention}

    def __init__(self, config: VideoLlamaAudioVisionConfig):
        super().__init__(config)
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        patch_embedding = nn.Conv3d(
            config.num_channels, config.hidden_size, kernel_size=patch, stride=patch, bias=False
        )
        self.embeddings = VideoLlamaPatchEmbeddings(patch_embedding, config.hidden_size, config.num_patches)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VideoLlamaEncoder(config, CLIPEncoderLayer)
        self.post_layernorm = VideoLlamaFloat32LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_frames, 3, image_size, image_size)`): Normalised frames.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(num_frames, 1 + num_patches, hidden_size)`,
            and `pooler_output` of shape `(num_frames, projection_dim)`, of length 1: unlike sound it is not scaled.
        """
        # A frame is a still video as long as one patch.
        still_videos = pixel_values.unsqueeze(2).expand(-1, -1, self.config.temporal_patch_size, -1, -1)
        hidden_states = self.encoder(self.pre_layernorm(self.embeddings(still_videos)), **kwargs)
        pooled = F.normalize(self.projection(self.post_layernorm(hidden_states[:, 0])).float(), dim=-1)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=pooled.to(hidden_states.dtype)
        )


__all__ = ["VideoLlamaAudioModel", "VideoLlamaAudioVisionModel", "VideoLlamaTower", "VideoLlamaVisionModel"]
