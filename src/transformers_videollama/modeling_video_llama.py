"""The Video-LLaMA model (arXiv 2306.02858).

Data flow, with N media, T frames, S sound clips and D the decoder's width:

    pixel_values_videos (N,T,3,224,224) -> vision_tower (ViT-g) -> qformer ---- + frame position -> video_branch -> (N,32,D)
    input_features (N,S,128,204) -------> audio_tower (ImageBind) ------------ + clip position --> audio_branch -> (N, 8,D)

The soft tokens replace the placeholder tokens of the embedded prompt, which the frozen decoder then continues. Only the
two branches are ever trained. An image is a video of one frame. To train the audio branch it is shown frames instead of
sound, through `audio_vision_tower`, because ImageBind puts both into one space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationMixin, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerLayer,
    Blip2QFormerModel,
    Blip2QFormerMultiHeadAttention,
)
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_video_llama import (
    VideoLlamaAudioConfig,
    VideoLlamaAudioVisionConfig,
    VideoLlamaConfig,
    VideoLlamaQFormerConfig,
    VideoLlamaVisionConfig,
)

MODALITIES = ("image", "video", "audio")
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


@dataclass
class VideoLlamaModelOutputWithPast(ModelOutput):
    """
    Output of [`VideoLlamaModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The decoder's last state.
        past_key_values (`Cache`, *optional*): The decoder's cache.
        hidden_states (`tuple[torch.Tensor]`, *optional*): The decoder's states, with `output_hidden_states=True`.
        attentions (`tuple[torch.Tensor]`, *optional*): The decoder's attention weights, with `output_attentions=True`.
        image_hidden_states (`torch.Tensor` of shape `(num_images, 32, hidden_size)`, *optional*): Soft tokens of images.
        video_hidden_states (`torch.Tensor` of shape `(num_videos, 32, hidden_size)`, *optional*): Soft tokens of videos.
        audio_hidden_states (`torch.Tensor` of shape `(num_sounds, 8, hidden_size)`, *optional*): Soft tokens of sounds.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None


@dataclass
class VideoLlamaCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`VideoLlamaForConditionalGeneration`]: that of [`VideoLlamaModelOutputWithPast`], with

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Mean next-token loss over the labels, if `labels` were given.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Scores before the softmax.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None


class VideoLlamaFloat32LayerNorm(nn.LayerNorm):
    """A layer norm computed in float32 whatever the dtype of its input and weights, as the published `ln_vision` is."""

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
        bias_k = self.bias_k.expand(batch_size, -1, -1)
        bias_v = self.bias_v.expand(batch_size, -1, -1)
        queries = self.q_proj(hidden_states).view(batch_size, sequence_length, -1, self.head_dim)
        keys = torch.cat([self.k_proj(hidden_states), bias_k], dim=1).view(
            batch_size, -1, self.num_heads, self.head_dim
        )
        values = torch.cat([self.v_proj(hidden_states), bias_v], dim=1).view(
            batch_size, -1, self.num_heads, self.head_dim
        )
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
        layer_norm (`bool`, *optional*, defaults to `False`): Whether patches are normalised before the class token joins.
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


class VideoLlamaPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and what the library must know of the model."""

    config: VideoLlamaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "CLIPEncoderLayer",
        "VideoLlamaVisionEncoderLayer",
        "VideoLlamaAudioEncoderLayer",
        "VideoLlamaPatchEmbeddings",
        "VideoLlamaBranch",
        "Blip2QFormerLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The published model computes `ln_vision` in float32, and 20 = exp(logit_scale) is not 20 if its logarithm is rounded.
    _keep_in_fp32_modules_strict = ["vision_tower.post_layernorm", "logit_scale"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VideoLlamaPatchEmbeddings):
            init.normal_(module.class_embedding, mean=0.0, std=std)
            init.normal_(module.position_embedding, mean=0.0, std=std)
        elif isinstance(module, VideoLlamaAudioAttention):
            init.normal_(module.bias_k, mean=0.0, std=std)
            init.normal_(module.bias_v, mean=0.0, std=std)
        elif isinstance(module, VideoLlamaAudioModel):
            init.constant_(module.logit_scale, torch.tensor(module.config.logit_scale_init_value).log().item())
        elif isinstance(module, (VideoLlamaBranch, VideoLlamaModel)):
            init.normal_(module.query_tokens, mean=0.0, std=std)


class VideoLlamaVisionModel(VideoLlamaPreTrainedModel):
    """The frame encoder: EVA-CLIP's ViT-g/14 up to its last but one block, then BLIP-2's layer norm."""

    config: VideoLlamaVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = ["post_layernorm"]
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

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_frames, 3, image_size, image_size)`): Normalised frames.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(num_frames, 1 + num_patches, hidden_size)`, after the layer
            norm; `hidden_states[-1]`, with `output_hidden_states=True`, is the state before it.
        """
        hidden_states = self.encoder(self.embeddings(pixel_values), **kwargs)
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden_states))


class VideoLlamaAudioModel(VideoLlamaPreTrainedModel):
    """The sound encoder: ImageBind's audio tower, one vector a clip, normalised and scaled."""

    config: VideoLlamaAudioConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _keep_in_fp32_modules_strict = ["logit_scale"]
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
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value).log())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

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


class VideoLlamaAudioVisionModel(VideoLlamaPreTrainedModel):
    """ImageBind's vision tower, through which the audio branch is shown frames while it trains: one vector a frame."""

    config: VideoLlamaAudioVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = []
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
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_frames, 3, image_size, image_size)`): Normalised frames.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(num_frames, 1 + num_patches, hidden_size)`, and
            `pooler_output` of shape `(num_frames, projection_dim)`, of length 1: unlike sound it is not scaled.
        """
        # A frame is a still video as long as one patch.
        still_videos = pixel_values.unsqueeze(2).expand(-1, -1, self.config.temporal_patch_size, -1, -1)
        hidden_states = self.encoder(self.pre_layernorm(self.embeddings(still_videos)), **kwargs)
        pooled = F.normalize(self.projection(self.post_layernorm(hidden_states[:, 0])).float(), dim=-1)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=pooled.to(hidden_states.dtype)
        )


class VideoLlamaQFormerModel(Blip2QFormerModel):
    """A Q-Former: learned queries that attend to themselves and, in some layers, to a memory."""

    config: VideoLlamaQFormerConfig
    # Run in the model's own dtype, unlike BLIP-2's.
    _keep_in_fp32_modules = None
    _can_record_outputs = {
        "hidden_states": Blip2QFormerLayer,
        "attentions": OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".crossattention"),
    }

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        # The library's flash-attention call takes one padding mask for queries and keys alike, so it cannot hide padded
        # frames from the queries. PyTorch's own attention can, and runs its flash kernel where nothing is padded.
        if attn_implementation is not None and "flash" in attn_implementation:
            attn_implementation = "sdpa"
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class VideoLlamaBranch(nn.Module):
    """
    The trainable half of a modality: positions in time are added to a memory of frames or clips, a Q-Former reads it
    into a fixed number of tokens, and a linear layer takes those to the decoder's width (paper, section 2.1).

    Args:
        config (`VideoLlamaQFormerConfig`): The Q-Former; `encoder_hidden_size` is the memory's width.
        num_query_tokens (`int`): Soft tokens of one medium.
        num_positions (`int`): Rows of the position table.
        output_size (`int`): The decoder's width.
        interpolate_positions (`bool`, *optional*, defaults to `False`):
            Whether longer media are accepted, by stretching the position table over them.
    """

    def __init__(
        self,
        config: VideoLlamaQFormerConfig,
        num_query_tokens: int,
        num_positions: int,
        output_size: int,
        interpolate_positions: bool = False,
    ):
        super().__init__()
        self.interpolate_positions = interpolate_positions
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.position_embedding = nn.Embedding(num_positions, config.encoder_hidden_size)
        self.qformer = VideoLlamaQFormerModel._from_config(config)
        self.projector = nn.Linear(config.hidden_size, output_size)

    def check_length(self, length: int, what: str) -> None:
        """Refuses a medium of more steps than positions, unless they may be interpolated. `what` names the steps."""
        num_positions = self.position_embedding.num_embeddings
        if length > num_positions and not self.interpolate_positions:
            raise ValueError(
                f"Got {length} {what}, but the model has positions for {num_positions}. Give at most {num_positions} "
                f"{what}; for videos, `interpolate_frame_positions=True` in the configuration stretches the positions "
                "over longer ones."
            )

    def get_positions(self, length: int, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Position embeddings of shape `(1 or N, length, encoder_hidden_size)`. A medium of n steps, of which there are at
        most as many as table rows, takes the first n rows; a longer one takes the table linearly interpolated to n rows
        (each medium by its own length, so that a batch gives what its members give alone).
        """
        table = self.position_embedding.weight
        num_positions = table.shape[0]
        if length <= num_positions:
            return table[None, :length]
        steps = torch.arange(length, device=table.device, dtype=torch.float32)[None]
        if padding_mask is None:
            lengths = torch.full((1, 1), length, device=table.device, dtype=torch.float32)
        else:
            lengths = padding_mask.sum(dim=1, keepdim=True).to(table.device, torch.float32)
        stretched = ((steps + 0.5) * num_positions / lengths - 0.5).clamp(0, num_positions - 1)
        rows = torch.where(lengths > num_positions, stretched, steps.clamp(max=num_positions - 1))
        lower = rows.floor().long()
        upper = (lower + 1).clamp(max=num_positions - 1)
        return torch.lerp(table[lower], table[upper], (rows - lower).unsqueeze(-1).to(table.dtype))

    def forward(self, memory: torch.Tensor, padding_mask: torch.Tensor | None = None) -> BaseModelOutputWithPooling:
        r"""
        Args:
            memory (`torch.Tensor` of shape `(N, length, tokens, encoder_hidden_size)`): `tokens` vectors a frame or clip.
            padding_mask (`torch.Tensor` of shape `(N, length)`, *optional*): 1 for frames, 0 for padding.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(N, num_query_tokens, hidden_size)` and
            `pooler_output` of shape `(N, num_query_tokens, output_size)`.
        """
        num_media, length, tokens_per_step, _ = memory.shape
        memory = (memory + self.get_positions(length, padding_mask).unsqueeze(2)).flatten(1, 2)
        memory_mask = None
        if padding_mask is not None:
            memory_mask = padding_mask.to(memory.device).repeat_interleave(tokens_per_step, dim=1)
        hidden_states = self.qformer(
            query_embeds=self.query_tokens.expand(num_media, -1, -1),
            encoder_hidden_states=memory,
            encoder_attention_mask=memory_mask,
            return_dict=True,
        ).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.projector(hidden_states))


class VideoLlamaModel(VideoLlamaPreTrainedModel):
    """Video-LLaMA without the language-modelling head: the encoders, the two branches and the decoder."""

    def __init__(self, config: VideoLlamaConfig):
        super().__init__(config)
        text_width = config.text_config.hidden_size
        self.vision_tower = VideoLlamaVisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = VideoLlamaQFormerModel._from_config(config.qformer_config)
        self.video_branch = VideoLlamaBranch(
            config.video_qformer_config,
            config.num_video_query_tokens,
            config.max_frames,
            text_width,
            interpolate_positions=config.interpolate_frame_positions,
        )
        self.audio_tower = self.audio_branch = self.audio_vision_tower = None
        if config.audio_config is not None:
            self.audio_tower = VideoLlamaAudioModel._from_config(config.audio_config)
            self.audio_branch = VideoLlamaBranch(
                config.audio_qformer_config,
                config.num_audio_query_tokens,
                config.audio_config.max_source_positions,
                text_width,
            )
        if config.audio_vision_config is not None:
            self.audio_vision_tower = VideoLlamaAudioVisionModel._from_config(config.audio_vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_frame_features(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        r"""
        Encodes frames one by one, `config.frame_chunk_size` at a time: frozen ViT, then the frozen image Q-Former.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_frames, 3, height, width)`): Normalised frames.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(num_frames, num_query_tokens, hidden_size)`; `hidden_states`
            and `attentions` are the ViT's, if asked for.
        """
        chunks = []
        for chunk in pixel_values.split(self.config.frame_chunk_size):
            vision_outputs = self.vision_tower(chunk, return_dict=True, **kwargs)
            hidden_states = self.qformer(
                query_embeds=self.query_tokens.expand(chunk.shape[0], -1, -1),
                encoder_hidden_states=vision_outputs.last_hidden_state,
                return_dict=True,
            ).last_hidden_state
            chunks.append((hidden_states, vision_outputs.hidden_states, vision_outputs.attentions))
        return BaseModelOutput(*_concatenate_chunks(chunks))

    @merge_with_config_defaults
    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        padding_mask_videos: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        The soft tokens of videos.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, num_frames, 3, height, width)`): Normalised frames.
            padding_mask_videos (`torch.Tensor` of shape `(num_videos, num_frames)`, *optional*):
                1 for frames, 0 for the padding after the last frame of shorter videos, which changes nothing.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(num_videos, num_video_query_tokens, hidden_size)` are
            the soft tokens, `last_hidden_state` the video Q-Former's output before the projection; `hidden_states` and
            `attentions` are the ViT's, one row a frame, if asked for.

        Raises:
            ValueError: if there are more frames than positions and `config.interpolate_frame_positions` is off.
        """
        num_videos, num_frames = pixel_values_videos.shape[:2]
        self.video_branch.check_length(num_frames, "frames")
        frames = self.get_frame_features(pixel_values_videos.flatten(0, 1), **kwargs)
        memory = frames.last_hidden_state.unflatten(0, (num_videos, num_frames))
        outputs = self.video_branch(memory, padding_mask_videos)
        outputs.hidden_states, outputs.attentions = frames.hidden_states, frames.attentions
        return outputs

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        The soft tokens of images: an image is a video of one frame.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`): Normalised images.

        Returns:
            `BaseModelOutputWithPooling`: as that of [`~VideoLlamaModel.get_video_features`].
        """
        kwargs["return_dict"] = True
        return self.get_video_features(pixel_values.unsqueeze(1), **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        The soft tokens of sounds, or of frames shown to the audio branch through ImageBind's vision tower.

        Args:
            input_features (`torch.Tensor` of shape `(num_sounds, num_clips, num_mel_bins, max_length)`, *optional*):
                Normalised log-mel clips.
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, num_frames, 3, height, width)`, *optional*):
                Normalised frames, instead of sound; at most `audio_config.max_source_positions` a video.
            padding_mask_videos (`torch.Tensor` of shape `(num_videos, num_frames)`, *optional*):
                1 for frames, 0 for the padding after the last frame of shorter videos.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(num_sounds, num_audio_query_tokens, hidden_size)` are
            the soft tokens, `last_hidden_state` the audio Q-Former's output before the projection; `hidden_states` and
            `attentions` are ImageBind's, one row a clip or frame, if asked for.

        Raises:
            ValueError: without an audio branch or, for frames, without the vision tower; for both or neither input.
        """
        if self.audio_branch is None:
            raise ValueError("This model has no audio branch (`config.audio_config` is None): it cannot hear.")
        if (input_features is None) == (pixel_values_videos is None):
            raise ValueError("Give the audio branch either `input_features` or `pixel_values_videos`.")
        if input_features is not None:
            tower, inputs, what = self.audio_tower, input_features, "clips"
        elif self.audio_vision_tower is None:
            raise ValueError(
                "To show frames to the audio branch the model needs ImageBind's vision tower, which is not built: "
                "load it with `audio_vision_config` set (it is left out by default because inference does not use it)."
            )
        else:
            tower, inputs, what = self.audio_vision_tower, pixel_values_videos, "frames"
        num_media, length = inputs.shape[:2]
        self.audio_branch.check_length(length, what)
        chunks = []
        for chunk in inputs.flatten(0, 1).split(self.config.frame_chunk_size):
            outputs = tower(chunk, return_dict=True, **kwargs)
            chunks.append((outputs.pooler_output, outputs.hidden_states, outputs.attentions))
        pooled, hidden_states, attentions = _concatenate_chunks(chunks)
        outputs = self.audio_branch(pooled.view(num_media, length, 1, -1), padding_mask_videos)
        outputs.hidden_states, outputs.attentions = hidden_states, attentions
        return outputs

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
    ) -> tuple[torch.BoolTensor, torch.BoolTensor, torch.BoolTensor]:
        """
        Where the soft tokens of images, videos and sounds go: three masks of shape `(batch_size, sequence_length)`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompt. Without it placeholders are found by their embedding, where they have one.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The embedded prompt.
            image_features, video_features, audio_features (`torch.Tensor`, *optional*): Soft tokens, to check their number.

        Raises:
            ValueError: if a medium's soft tokens are not as many as its placeholders; the message names both counts.
        """
        masks = []
        for modality, features in zip(MODALITIES, (image_features, video_features, audio_features), strict=True):
            token_id = getattr(self.config, f"{modality}_token_id")
            if input_ids is not None:
                mask = input_ids == token_id
            elif token_id < self.get_input_embeddings().num_embeddings:
                placeholder = self.get_input_embeddings().weight[token_id]
                mask = (inputs_embeds == placeholder.to(inputs_embeds)).all(-1)
            else:
                mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            if features is not None:
                num_features = features.numel() // features.shape[-1]
                torch_compilable_check(
                    mask.sum() == num_features,
                    lambda modality=modality, mask=mask, num_features=num_features: (
                        f"The prompt has {int(mask.sum())} {modality} placeholder tokens, but the {modality} input gives "
                        f"{num_features} soft tokens: put one placeholder for every soft token, as the processor does."
                    ),
                )
            masks.append(mask)
        return tuple(masks)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        audio_padding_mask_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VideoLlamaModelOutputWithPast:
        r"""
        Media of all prompts of the batch are concatenated along their first dimension, in reading order.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompt, with a placeholder for every soft token.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): Normalised images.
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, num_frames, 3, height, width)`, *optional*):
                Normalised frames.
            input_features (`torch.Tensor` of shape `(num_sounds, num_clips, num_mel_bins, max_length)`, *optional*):
                Normalised log-mel clips.
            audio_pixel_values_videos (`torch.Tensor` of shape `(num_videos, num_frames, 3, height, width)`, *optional*):
                Frames for the audio branch, in place of `input_features`, to train it.
            padding_mask_videos (`torch.Tensor` of shape `(num_videos, num_frames)`, *optional*):
                1 for frames of `pixel_values_videos`, 0 for the padding of shorter videos.
            audio_padding_mask_videos (`torch.Tensor` of shape `(num_videos, num_frames)`, *optional*):
                The same for `audio_pixel_values_videos`.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                Outputs of the feature getters under `"image"`, `"video"` and `"audio"`, in place of the media themselves.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        media = {
            "image": pixel_values,
            "video": pixel_values_videos,
            "audio": input_features if input_features is not None else audio_pixel_values_videos,
        }
        encoded = dict(mm_encoder_outputs or {})
        for modality, medium in media.items():
            if medium is not None and encoded.get(modality) is not None:
                raise ValueError(f"Give the {modality} input either itself or in `mm_encoder_outputs`, not both.")
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, return_dict=True)
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, padding_mask_videos, return_dict=True)
        if media["audio"] is not None:
            encoded["audio"] = self.get_audio_features(
                input_features, audio_pixel_values_videos, audio_padding_mask_videos, return_dict=True
            )

        if inputs_embeds is None:
            # Placeholders may lie past the vocabulary; any row of the table will do, as soft tokens take their place.
            is_placeholder = self.is_placeholder(input_ids)
            self._check_media_are_given(is_placeholder, input_ids, encoded, past_key_values)
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        features = {
            modality: encoded[modality].pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            if encoded.get(modality) is not None
            else None
            for modality in MODALITIES
        }
        if any(feature is not None for feature in features.values()):
            masks = self.get_placeholder_mask(
                input_ids, inputs_embeds, **{f"{modality}_features": features[modality] for modality in MODALITIES}
            )
            for mask, feature in zip(masks, features.values(), strict=True):
                if feature is not None:
                    inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), feature)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return VideoLlamaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features["image"],
            video_hidden_states=features["video"],
            audio_hidden_states=features["audio"],
        )

    def is_placeholder(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """Which tokens are placeholders of any medium: a mask of the shape of `input_ids`."""
        config = self.config
        return (
            (input_ids == config.image_token_id)
            | (input_ids == config.video_token_id)
            | (input_ids == config.audio_token_id)
        )

    def _check_media_are_given(
        self,
        is_placeholder: torch.BoolTensor,
        input_ids: torch.LongTensor,
        encoded: dict[str, BaseModelOutputWithPooling],
        past_key_values: Cache | None,
    ) -> None:
        """
        Refuses placeholders without a medium. Decoding steps are left out: they would wait for the device at every token,
        and what they continue was checked at the prefill.
        """
        if (
            input_ids.shape[1] == 1
            or is_tracing()
            or (past_key_values is not None and past_key_values.get_seq_length())
        ):
            return
        if not is_placeholder.any():
            return
        for modality in MODALITIES:
            count = int((input_ids == getattr(self.config, f"{modality}_token_id")).sum())
            if count and encoded.get(modality) is None:
                raise ValueError(
                    f"The prompt has {count} {modality} placeholder tokens, but the {modality} input gives 0 soft tokens: "
                    f"no {modality} was passed."
                )

    def train(self, mode: bool = True) -> "VideoLlamaModel":
        """Sets the mode, but the encoders, which are never trained, stay in eval mode (paper, section 2.2)."""
        super().train(mode)
        for encoder in (self.vision_tower, self.qformer, self.audio_tower, self.audio_vision_tower):
            if encoder is not None:
                encoder.eval()
        return self


class VideoLlamaForConditionalGeneration(VideoLlamaPreTrainedModel, GenerationMixin):
    """Video-LLaMA: answers questions about what is seen and heard."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VideoLlamaConfig):
        super().__init__(config)
        self.model = VideoLlamaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`VideoLlamaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        padding_mask_videos: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`VideoLlamaModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, padding_mask_videos, **kwargs)

    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`VideoLlamaModel.get_audio_features`]."""
        return self.model.get_audio_features(input_features, pixel_values_videos, padding_mask_videos, **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        audio_padding_mask_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VideoLlamaCausalLMOutputWithPast:
        r"""
        See [`VideoLlamaModel.forward`] for the other arguments.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The tokens to be predicted, `-100` where there is no loss. Placeholders never count.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for this many last positions only, or for these positions; 0 means for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            audio_pixel_values_videos=audio_pixel_values_videos,
            padding_mask_videos=padding_mask_videos,
            audio_padding_mask_videos=audio_padding_mask_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, slice_indices, :])
        loss = None
        if labels is not None:
            labels = labels.masked_fill(self.model.is_placeholder(labels), -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return VideoLlamaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
        )

    # What follows fits `generate` to media. They are encoded once, before the prefill, and only what the cache does not
    # hold yet; the soft tokens, not the media, are repeated for beams and several answers.

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
        **model_kwargs,
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
        self, input_ids: torch.LongTensor, is_first_iteration: bool | None = False, **kwargs
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in MEDIA_INPUTS:
                model_inputs.pop(name, None)
        return model_inputs

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        return _InVocabularyLogitsProcessorList(processors, self.config.text_config.vocab_size)

    def _get_stopping_criteria(
        self, generation_config, stopping_criteria: StoppingCriteriaList | None = None, tokenizer=None, **kwargs
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

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
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

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        if len(self):
            input_ids = torch.where(input_ids < self.vocab_size, input_ids, input_ids[:, :1])
        return super().__call__(input_ids, scores, **kwargs)


def _concatenate_chunks(chunks: list[tuple]) -> tuple[torch.Tensor, tuple | None, tuple | None]:
    """Joins `(states, hidden_states, attentions)` of chunks of frames, the last two being one tensor a layer or None."""
    states, hidden_states, attentions = zip(*chunks, strict=True)

    def join_layers(layers: tuple) -> tuple | None:
        return None if layers[0] is None else tuple(torch.cat(layer) for layer in zip(*layers, strict=True))

    return torch.cat(states), join_layers(hidden_states), join_layers(attentions)


def _as_list(strings: str | list[str]) -> list[str]:
    return [strings] if isinstance(strings, str) else list(strings)


__all__ = [
    "VideoLlamaAudioModel",
    "VideoLlamaAudioVisionModel",
    "VideoLlamaForConditionalGeneration",
    "VideoLlamaModel",
    "VideoLlamaPreTrainedModel",
    "VideoLlamaQFormerModel",
    "VideoLlamaVisionModel",
]
