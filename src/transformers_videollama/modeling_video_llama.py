"""The Video-LLaMA model (arXiv 2306.02858).

Data flow, with N media, T frames, S sound clips and D the decoder's width:

    pixel_values_videos (N,T,3,224,224) -> vision_tower (ViT-g) -> qformer + frame position -> video_branch -> (N,32,D)
    input_features (N,S,128,204) -------> audio_tower (ImageBind) ------- + clip position --> audio_branch -> (N, 8,D)

The soft tokens replace the placeholder tokens of the embedded prompt, which the frozen decoder then continues. Only
the two branches are ever trained. An image is a video of one frame. To train the audio branch it is shown frames
instead of sound, through `audio_vision_tower`, because ImageBind puts both into one space.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import (
    TransformersKwargs,
    can_return_tuple,
    torch_compilable_check,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing

from .configuration_video_llama import (
    VideoLlamaAudioVisionConfig,
    VideoLlamaConfig,
    VideoLlamaVisionConfig,
)
from .generation_video_llama import (
    CACHE_NAME,
    MODALITIES,
    VideoLlamaGenerationMixin,
    check_soft_token_count,
    takes_either_cache_name,
)
from .loading_video_llama import VideoLlamaLoadingMixin
from .model_card import VideoLlamaModelCardMixin
from .modeling_video_llama_branches import VideoLlamaBranch, VideoLlamaQFormerModel
from .modeling_video_llama_towers import (
    VideoLlamaAudioModel,
    VideoLlamaAudioVisionModel,
    VideoLlamaVisionModel,
)
from .walk import walk_modules, walk_parameters

VLLM_ATTENTION = "vllm"  # what vLLM calls its own in the configuration of the decoder that it builds
_ENCODERS = ("vision_tower", "qformer", "audio_tower", "audio_vision_tower")
_PARTS = ("video_branch", "audio_branch", *_ENCODERS, "language_model")


@dataclass
class VideoLlamaModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`VideoLlamaModel`]: that of the decoder, `last_hidden_state` of shape `(batch_size, sequence_length,
    hidden_size)`, its cache, `hidden_states` and `attentions`, with

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, 32, hidden_size)`, *optional*):
            Soft tokens of images.
        video_hidden_states (`torch.Tensor` of shape `(num_videos, 32, hidden_size)`, *optional*):
            Soft tokens of videos.
        audio_hidden_states (`torch.Tensor` of shape `(num_sounds, 8, hidden_size)`, *optional*):
            Soft tokens of sounds.
        image_outputs, video_outputs, audio_outputs (`BaseModelOutputWithPooling`, *optional*):
            All that the feature getters gave; or what `mm_encoder_outputs` held.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None
    audio_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class VideoLlamaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`VideoLlamaForConditionalGeneration`]: that of any causal language model, `loss` of shape `()`, the mean
    next-token loss over the labels, if `labels` were given, `logits` of shape `(batch_size, sequence_length,
    vocab_size)`, the decoder's cache, `hidden_states` and `attentions`, and what [`VideoLlamaModelOutputWithPast`] has
    of images, videos and sounds.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None
    audio_outputs: BaseModelOutputWithPooling | None = None


class VideoLlamaPreTrainedModel(VideoLlamaLoadingMixin, VideoLlamaModelCardMixin, PreTrainedModel):
    """What the library must know of the model with and without its head."""

    config: VideoLlamaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoLlamaBranch", "Blip2QFormerLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    # Left out on purpose when the configuration has no such tower
    _keys_to_ignore_on_load_unexpected = [r"audio_vision_tower\."]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (VideoLlamaBranch, VideoLlamaModel)):
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)


class VideoLlamaEmbedding(nn.Embedding):
    """Token embeddings that take ids past the vocabulary, which placeholders have, for that of any other token."""

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return super().forward(input_ids.masked_fill(input_ids >= self.num_embeddings, 0))


class VideoLlamaModel(VideoLlamaPreTrainedModel):
    """Video-LLaMA without the language-modelling head: the encoders, the two branches and the decoder."""

    _auto_class = "AutoModel"

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
        self.audio_tower: VideoLlamaAudioModel | None = None
        self.audio_branch: VideoLlamaBranch | None = None
        self.audio_vision_tower: VideoLlamaAudioVisionModel | None = None
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
        if config.text_config._attn_implementation == VLLM_ATTENTION:
            # vLLM embeds a whole prompt by the decoder's own table before it puts the soft tokens in
            self.language_model.get_input_embeddings().__class__ = VideoLlamaEmbedding
        self._trainable_parts: tuple[str, ...] = ()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def load_audio_vision_tower(self, path: str | None = None, **kwargs: Any) -> None:
        """
        Loads ImageBind's vision tower, which lets the audio branch be trained on frames. A converted checkpoint keeps
        it in a folder of its own, `audio_vision_tower`, so that inference neither downloads nor loads it. Saving the
        model afterwards saves the tower with it.

        Args:
            path (`str`, *optional*): Folder or Hub id of the checkpoint; where the model was loaded from by default.
            kwargs: Passed to `from_pretrained`, such as `revision` or `token`.

        Raises:
            OSError: if the checkpoint has no such folder.
            ValueError: if the model has no audio branch, or one of another size.
        """
        path = path or self.config._name_or_path
        try:
            tower = VideoLlamaAudioVisionModel.from_pretrained(
                path,
                subfolder="audio_vision_tower",
                dtype=self.dtype,
                attn_implementation=self.config._attn_implementation,
                **kwargs,
            )
        except OSError as error:
            raise OSError(
                f"{path} has no folder audio_vision_tower with ImageBind's vision tower, which a model that was saved "
                "without it lacks. Copy that of the converted checkpoint into it, or give the checkpoint as `path`."
            ) from error
        config = copy.deepcopy(self.config)
        config.audio_vision_config = tower.config
        if config.audio_config is None:
            raise ValueError("This model has no audio branch (`config.audio_config` is None) to train.")
        config.validate_architecture()
        self.config.audio_vision_config = tower.config
        self.audio_vision_tower = tower.to(self.audio_tower.device).eval()

    def get_frame_features(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        r"""
        Encodes frames one by one, `config.frame_chunk_size` at a time: frozen ViT, then the frozen image Q-Former.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_frames, 3, height, width)`): Normalised frames.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(num_frames, num_query_tokens, hidden_size)`;
            `hidden_states` and `attentions` are the ViT's, if asked for.
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

    def get_clip_features(
        self,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        ImageBind's vectors of sounds or of frames, encoded `config.frame_chunk_size` clips or frames at a time.

        Args:
            input_features (`torch.Tensor` of shape `(num_sounds, num_clips, num_mel_bins, max_length)`, *optional*):
                Normalised log-mel clips.
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, num_frames, 3, height, width)`, *optional*):
                Normalised frames, instead of sound.

        Returns:
            `BaseModelOutput`: `last_hidden_state` of shape `(num_sounds, num_clips or num_frames, projection_dim)`;
            `hidden_states` and `attentions` are ImageBind's, if asked for.

        Raises:
            ValueError: without an audio branch or, for frames, without the vision tower.
        """
        tower, inputs, _ = self._choose_audio_tower(input_features, pixel_values_videos)
        chunks = []
        for chunk in inputs.flatten(0, 1).split(self.config.frame_chunk_size):
            outputs = tower(chunk, return_dict=True, **kwargs)
            chunks.append((outputs.pooler_output, outputs.hidden_states, outputs.attentions))
        pooled, hidden_states, attentions = _concatenate_chunks(chunks)
        return BaseModelOutput(pooled.unflatten(0, inputs.shape[:2]), hidden_states, attentions)

    def _choose_audio_tower(
        self, input_features: torch.Tensor | None, pixel_values_videos: torch.Tensor | None
    ) -> tuple[Any, torch.Tensor, str]:
        """The tower of ImageBind that encodes this input, the input, checked, and what a step of it is called."""
        if self.audio_branch is None:
            raise ValueError("This model has no audio branch (`config.audio_config` is None): it cannot hear.")
        if (input_features is None) == (pixel_values_videos is None):
            raise ValueError("Give the audio branch either `input_features` or `pixel_values_videos`.")
        if input_features is not None:
            clip_shape = (self.config.audio_config.num_mel_bins, self.config.audio_config.max_length)
            if (
                input_features.ndim != 4
                or tuple(input_features.shape[2:]) != clip_shape
                or not input_features.shape[1]
            ):
                raise ValueError(
                    f"`input_features` must be of shape (sounds, clips, {clip_shape[0]}, {clip_shape[1]}), but is of "
                    f"shape {tuple(input_features.shape)}."
                )
            return self.audio_tower, input_features, "clips"
        if self.audio_vision_tower is None:
            raise ValueError(
                "To show frames to the audio branch the model needs ImageBind's vision tower, which is not built, "
                "because only training uses it. Load it with `model.load_audio_vision_tower()`."
            )
        _check_frames(pixel_values_videos, None, self.config.audio_vision_config)
        return self.audio_vision_tower, pixel_values_videos, "frames"

    @merge_with_config_defaults
    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        The soft tokens of videos.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, num_frames, 3, height, width)`, *optional*):
                Normalised frames.
            padding_mask_videos (`torch.Tensor` of shape `(num_videos, num_frames)`, *optional*):
                1 for frames, 0 for the padding after the last frame of shorter videos, which changes nothing.
            frame_features (`torch.Tensor` of shape `(num_videos, num_frames, num_query_tokens, qformer_hidden_size)`,
            *optional*):
                What [`~VideoLlamaModel.get_frame_features`] gave for the frames, instead of the frames.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(num_videos, num_video_query_tokens, hidden_size)`
            are the soft tokens, `last_hidden_state` the video Q-Former's output before the projection; `hidden_states`
            and `attentions` are the ViT's, one row a frame, if asked for.

        Raises:
            ValueError: if there are more frames than positions and `config.interpolate_frame_positions` is off; for
                both frames and their features, or neither.
        """
        if (pixel_values_videos is None) == (frame_features is None):
            raise ValueError("Give the video branch either `pixel_values_videos` or `frame_features`.")
        if frame_features is not None:
            _check_features(
                "frame_features",
                "(videos, frames, query tokens, width)",
                frame_features,
                (self.config.num_query_tokens, self.config.qformer_config.hidden_size),
                padding_mask_videos,
            )
            self.video_branch.check_length(frame_features.shape[1], "frames")
            return self.video_branch(frame_features.to(self.video_branch.query_tokens.dtype), padding_mask_videos)
        _check_frames(pixel_values_videos, padding_mask_videos, self.config.vision_config)
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
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        The soft tokens of images: an image is a video of one frame.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): Normalised images.
            frame_features (`torch.Tensor` of shape `(num_images, num_query_tokens, qformer_hidden_size)`, *optional*):
                What [`~VideoLlamaModel.get_frame_features`] gave for the images, instead of the images.

        Returns:
            `BaseModelOutputWithPooling`: as that of [`~VideoLlamaModel.get_video_features`].
        """
        if (pixel_values is None) == (frame_features is None):
            raise ValueError("Give the video branch either `pixel_values` or `frame_features`.")
        if frame_features is not None:
            kwargs["return_dict"] = True
            return self.get_video_features(frame_features=frame_features.unsqueeze(1), **kwargs)
        if pixel_values.ndim != 4:
            raise ValueError(
                "`pixel_values` must be of shape (images, channels, height, width), but is of shape "
                f"{tuple(pixel_values.shape)}."
            )
        kwargs["return_dict"] = True
        return self.get_video_features(pixel_values.unsqueeze(1), **kwargs)

    @merge_with_config_defaults
    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        clip_features: torch.Tensor | None = None,
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
            clip_features (`torch.Tensor` of shape `(num_sounds, num_clips or num_frames, projection_dim)`,
            *optional*):
                What [`~VideoLlamaModel.get_clip_features`] gave for the clips or frames, instead of them.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(num_sounds, num_audio_query_tokens, hidden_size)`
            are the soft tokens, `last_hidden_state` the audio Q-Former's output before the projection; `hidden_states`
            and `attentions` are ImageBind's, one row a clip or frame, if asked for.

        Raises:
            ValueError: without an audio branch or, for frames, without the vision tower; unless given just one of the
            inputs.
        """
        branch: Any = self.audio_branch
        if clip_features is None:
            _, inputs, what = self._choose_audio_tower(input_features, pixel_values_videos)
            if pixel_values_videos is not None:
                _check_frames(pixel_values_videos, padding_mask_videos, self.config.audio_vision_config)
            branch.check_length(inputs.shape[1], what)
            clips = self.get_clip_features(input_features, pixel_values_videos, **kwargs)
            outputs = branch(clips.last_hidden_state.unsqueeze(2), padding_mask_videos)
            outputs.hidden_states, outputs.attentions = clips.hidden_states, clips.attentions
            return outputs
        if branch is None or input_features is not None or pixel_values_videos is not None:
            raise ValueError(
                "`clip_features` stand for sounds or frames: give them alone, to a model with an audio branch."
            )
        width = self.config.audio_config.projection_dim
        _check_features("clip_features", "(sounds, clips, width)", clip_features, (width,), padding_mask_videos)
        branch.check_length(clip_features.shape[1], "clips")
        memory = clip_features.unsqueeze(2).to(branch.query_tokens.dtype)
        return branch(memory, padding_mask_videos)

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
            image_features, video_features, audio_features (`torch.Tensor`, *optional*):
                Soft tokens, to check their number.

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
                width = inputs_embeds.shape[-1]
                if features.shape[-1] != width:
                    raise ValueError(
                        f"The {modality} input gives soft tokens of width {features.shape[-1]}, but the decoder's is "
                        f"{width}: were they encoded by another model?"
                    )
                num_features = features.numel() // width
                if is_tracing():
                    torch_compilable_check(mask.sum() == num_features, "placeholders and soft tokens differ in number")
                else:
                    check_soft_token_count(modality, int(mask.sum()), num_features)
            masks.append(mask)
        return tuple(masks)

    @takes_either_cache_name
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
        image_frame_features: torch.Tensor | None = None,
        video_frame_features: torch.Tensor | None = None,
        audio_clip_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
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
            audio_pixel_values_videos (`torch.Tensor` of shape `(num_videos, num_frames, 3, height, width)`,
            *optional*):
                Frames for the audio branch, in place of `input_features`, to train it.
            padding_mask_videos (`torch.Tensor` of shape `(num_videos, num_frames)`, *optional*):
                1 for frames of `pixel_values_videos`, 0 for the padding of shorter videos.
            audio_padding_mask_videos (`torch.Tensor` of shape `(num_videos, num_frames)`, *optional*):
                The same for `audio_pixel_values_videos`.
            image_frame_features (`torch.Tensor` of shape `(num_images, num_query_tokens, qformer_hidden_size)`,
            *optional*):
                What [`~VideoLlamaModel.get_frame_features`] gave for the images, in place of `pixel_values`.
            video_frame_features (`torch.Tensor` of shape `(num_videos, num_frames, num_query_tokens,
            qformer_hidden_size)`, *optional*):
                The same for the frames of videos, in place of `pixel_values_videos`.
            audio_clip_features (`torch.Tensor` of shape `(num_sounds, num_clips or num_frames, projection_dim)`,
            *optional*):
                What [`~VideoLlamaModel.get_clip_features`] gave, in place of `input_features` or
                `audio_pixel_values_videos`.
            cache (`Cache`, *optional*):
                The decoder's cache, which `transformers` before 5.24 calls `past_key_values`; either name will do.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                Outputs of the feature getters under `"image"`, `"video"` and `"audio"`, in place of the media
                themselves.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        cache = past_key_values if cache is None else cache
        media = {
            "image": {"pixel_values": pixel_values, "frame_features": image_frame_features},
            "video": {"pixel_values_videos": pixel_values_videos, "frame_features": video_frame_features},
            "audio": {
                "input_features": input_features,
                "pixel_values_videos": audio_pixel_values_videos,
                "clip_features": audio_clip_features,
            },
        }
        padding_masks = {"video": padding_mask_videos, "audio": audio_padding_mask_videos}
        encoded = dict(mm_encoder_outputs or {})
        for modality, given in media.items():
            if all(medium is None for medium in given.values()):
                continue
            if encoded.get(modality) is not None:
                raise ValueError(f"Give the {modality} input either itself or in `mm_encoder_outputs`, not both.")
            mask = {"padding_mask_videos": padding_masks[modality]} if modality in padding_masks else {}
            encoded[modality] = getattr(self, f"get_{modality}_features")(**given, **mask, return_dict=True)

        features = {}
        # A decoding step, one token without media, is left to the decoder: its token is one of the vocabulary.
        if inputs_embeds is None and (encoded or input_ids.shape[1] > 1 or cache is None):
            # Placeholders may lie past the vocabulary; any row of the table will do, as soft tokens take their place.
            is_placeholder = self.is_placeholder(input_ids)
            self._check_media_are_given(is_placeholder, input_ids, encoded, cache)
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        if encoded:
            features = {
                modality: outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
                for modality, outputs in encoded.items()
                if outputs is not None
            }
            masks = self.get_placeholder_mask(
                input_ids, inputs_embeds, **{f"{modality}_features": features.get(modality) for modality in MODALITIES}
            )
            for modality, mask in zip(MODALITIES, masks, strict=True):
                if modality in features:
                    inputs_embeds = _put_soft_tokens(inputs_embeds, mask, features[modality])

        outputs = self.language_model(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return VideoLlamaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features.get("image"),
            video_hidden_states=features.get("video"),
            audio_hidden_states=features.get("audio"),
            image_outputs=encoded.get("image"),
            video_outputs=encoded.get("video"),
            audio_outputs=encoded.get("audio"),
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
        cache: Cache | None,
    ) -> None:
        """
        Refuses placeholders without a medium. Continuations of a cache are left out: they would wait for the device at
        every step, and what they continue was checked at the prefill.
        """
        if input_ids.shape[1] == 1 or is_tracing() or (cache is not None and cache.get_seq_length()):
            return
        if not is_placeholder.any():
            return
        for modality in MODALITIES:
            if encoded.get(modality) is None:
                count = int((input_ids == getattr(self.config, f"{modality}_token_id")).sum())
                check_soft_token_count(modality, count, 0)

    def set_trainable(self, parts: str | Sequence[str]) -> list[str]:
        """
        Chooses what is trained: its parameters require gradients, all others do not and their modules stay in eval
        mode.

        Args:
            parts (`str` or `Sequence[str]`):
                `"video"` or `"audio"` for what the published training of that branch trains (paper, section 2.2), or a
                list of the model's parts: `"video_branch"`, `"audio_branch"`, `"vision_tower"`, `"qformer"` (with
                `query_tokens`), `"audio_tower"`, `"audio_vision_tower"`, `"language_model"` (with the head).

        Returns:
            `list[str]`: the names of the parameters that are trained.

        Raises:
            ValueError: if this model has no such part.
        """
        names = (
            {"video": ["video_branch"], "audio": ["audio_branch"]}.get(parts, [parts])
            if isinstance(parts, str)
            else parts
        )
        for name in names:
            if name not in _PARTS or getattr(self, name) is None:
                present = [part for part in _PARTS if getattr(self, part) is not None]
                raise ValueError(f"This model has no part {name!r} to train: choose from {', '.join(present)}.")
        self._trainable_parts = tuple(names)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for name in names:
            for parameter in getattr(self, name).parameters():
                parameter.requires_grad_(True)
        self.query_tokens.requires_grad_("qformer" in names)
        self.train(self.training)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> "VideoLlamaModel":
        """
        Sets the mode, but parts without trainable parameters stay in eval mode, and so do the encoders, unless
        [`~VideoLlamaModel.set_trainable`] named them (paper, section 2.2).
        """
        self.training = mode
        # A trainer asks for this at every step: of thousands of modules that rest already none is set again
        for name, part in self.named_children():
            rests = name in _ENCODERS and name not in self._trainable_parts
            if mode and not rests and any(parameter.requires_grad for parameter in walk_parameters(part)):
                part.train()
            elif any(module.training for module in walk_modules(part)):
                part.eval()
        return self


class VideoLlamaForConditionalGeneration(VideoLlamaPreTrainedModel, VideoLlamaGenerationMixin):
    """Video-LLaMA: answers questions about what is seen and heard."""

    _auto_class = "AutoModelForImageTextToText"

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VideoLlamaConfig):
        super().__init__(config)
        self.model = VideoLlamaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`VideoLlamaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, frame_features, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`VideoLlamaModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, padding_mask_videos, frame_features, **kwargs)

    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        padding_mask_videos: torch.Tensor | None = None,
        clip_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`VideoLlamaModel.get_audio_features`]."""
        return self.model.get_audio_features(
            input_features, pixel_values_videos, padding_mask_videos, clip_features, **kwargs
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See [`torch.nn.Module.zero_grad`], which takes longer to find the few gradients among the parameters."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for parameter in walk_parameters(self):
            if parameter.grad is not None:
                parameter.grad = None

    def set_trainable(self, parts: str | Sequence[str]) -> list[str]:
        """See [`VideoLlamaModel.set_trainable`]."""
        self.model.set_trainable(parts)
        self.lm_head.requires_grad_("language_model" in self.model._trainable_parts)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def load_audio_vision_tower(self, path: str | None = None, **kwargs: Any) -> None:
        """See [`VideoLlamaModel.load_audio_vision_tower`]."""
        self.model.load_audio_vision_tower(path, **kwargs)

    @takes_either_cache_name
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
        image_frame_features: torch.Tensor | None = None,
        video_frame_features: torch.Tensor | None = None,
        audio_clip_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
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
            skip_logits (`bool`, *optional*, defaults to `False`):
                With labels, return the loss without logits, and compute no more of them than the loss needs: those
                that predict a label, a small part of a prompt of soft tokens and questions. For training.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            audio_pixel_values_videos=audio_pixel_values_videos,
            padding_mask_videos=padding_mask_videos,
            audio_padding_mask_videos=audio_padding_mask_videos,
            image_frame_features=image_frame_features,
            video_frame_features=video_frame_features,
            audio_clip_features=audio_clip_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values if cache is None else cache},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if labels is not None:
            labels = labels.masked_fill(self.model.is_placeholder(labels), -100)
        loss, logits = None, None
        if labels is not None and skip_logits:
            hidden_states = outputs.last_hidden_state
            if labels.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"`labels` are of shape {tuple(labels.shape)}, but the prompt is of shape "
                    f"{tuple(hidden_states.shape[:2])}: give a label, or -100, for each of its tokens."
                )
            # What predicts a label: the last of a sequence predicts none. By position, for which a GPU is waited once
            positions = nn.functional.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)
            loss = self.loss_function(
                logits=self.lm_head(hidden_states.flatten(0, 1).index_select(0, positions.to(hidden_states.device))),
                labels=None,
                shift_labels=labels.flatten().index_select(0, positions + 1),
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        else:
            slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, slice_indices, :])
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
                )
        return VideoLlamaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
            image_outputs=outputs.image_outputs,
            video_outputs=outputs.video_outputs,
            audio_outputs=outputs.audio_outputs,
        )


def _put_soft_tokens(inputs_embeds: torch.Tensor, mask: torch.BoolTensor, soft_tokens: torch.Tensor) -> torch.Tensor:
    """
    The embedded prompts with the soft tokens, in order, where the mask is true, which it must be once for each.
    `masked_scatter` would do the same, but for its gradient the host waits until a GPU is done with the decoder.
    """
    soft_tokens = soft_tokens.reshape(-1, inputs_embeds.shape[-1])
    positions = mask.flatten().byte().argsort(descending=True, stable=True)[: soft_tokens.shape[0]]
    return inputs_embeds.flatten(0, 1).index_copy(0, positions, soft_tokens).view_as(inputs_embeds)


def _check_frames(
    pixel_values_videos: torch.Tensor,
    padding_mask_videos: torch.Tensor | None,
    config: VideoLlamaVisionConfig | VideoLlamaAudioVisionConfig,
) -> None:
    """Refuses frames of a shape that the tower of this configuration cannot encode, and masks that do not fit them."""
    frame_shape = (config.num_channels, config.image_size, config.image_size)
    shape = tuple(pixel_values_videos.shape)
    if len(shape) != 5 or shape[2:] != frame_shape or not shape[1]:
        raise ValueError(
            f"Frames must be of shape (videos, frames, {', '.join(map(str, frame_shape))}), but are of shape {shape}."
        )
    if padding_mask_videos is not None and tuple(padding_mask_videos.shape) != shape[:2]:
        raise ValueError(
            f"The frames' padding mask must be of shape {shape[:2]}, but is of shape "
            f"{tuple(padding_mask_videos.shape)}."
        )


def _check_features(
    name: str, axes: str, features: torch.Tensor, inner_shape: tuple[int, ...], padding_mask: torch.Tensor | None
) -> None:
    """
    Refuses features of frames or clips that do not have the shape (media, steps, *inner_shape), and masks that do not
    fit.
    """
    shape = tuple(features.shape)
    if len(shape) != 2 + len(inner_shape) or shape[2:] != inner_shape or not shape[1]:
        raise ValueError(
            f"`{name}` must be of shape {axes} with the last sizes {inner_shape}, but is of shape {shape}: were they "
            "made by another model?"
        )
    if padding_mask is not None and tuple(padding_mask.shape) != shape[:2]:
        raise ValueError(
            f"The padding mask must be of shape {shape[:2]}, but is of shape {tuple(padding_mask.shape)}."
        )


def _concatenate_chunks(chunks: list[tuple]) -> tuple[torch.Tensor, tuple | None, tuple | None]:
    """
    Joins `(states, hidden_states, attentions)` of chunks of frames, the last two being one tensor a layer or None.
    """
    states, hidden_states, attentions = zip(*chunks, strict=True)

    def join_layers(layers: tuple) -> tuple | None:
        return None if layers[0] is None else tuple(torch.cat(layer) for layer in zip(*layers, strict=True))

    return torch.cat(states), join_layers(hidden_states), join_layers(attentions)


__all__ = [
    "VideoLlamaForConditionalGeneration",
    "VideoLlamaModel",
    "VideoLlamaPreTrainedModel",
    "VideoLlamaQFormerModel",
]
