"""Configuration of Video-LLaMA: the sizes of every part, and the checks that the parts fit together.

`VideoLlamaConfig` is composed of one sub-configuration a part, in the order in which data flows through the model:
frames -> `vision_config` -> `qformer_config` -> `video_qformer_config` -> `text_config`, and
sound -> `audio_config` -> `audio_qformer_config` -> `text_config`.
"""

import copy
from dataclasses import field
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

if TYPE_CHECKING:
    # What a saved configuration names below. The library puts the files of all that is imported here beside it.
    from .modeling_video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel  # noqa: F401
    from .pipeline_video_text_to_text import VideoTextToTextPipeline  # noqa: F401

# Where a saved folder's own files have the classes, for those who load it with `trust_remote_code=True` instead of
# importing this package.
AUTO_MAP = {
    "AutoConfig": "configuration_video_llama.VideoLlamaConfig",
    "AutoModel": "modeling_video_llama.VideoLlamaModel",
    "AutoModelForImageTextToText": "modeling_video_llama.VideoLlamaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_video_llama.VideoLlamaForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "video-text-to-text": {
        "impl": "pipeline_video_text_to_text.VideoTextToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}

# The decoders of the published checkpoints, as differences from LLaMA-2-7B-Chat, which is `LlamaConfig()` with the
# limits below. Every one of them is a `LlamaForCausalLM`.
_LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_LLAMA_1 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
PUBLISHED_DECODERS: dict[str, dict[str, Any]] = {
    "llama-2-7b-chat": {**_LLAMA_2},
    "llama-2-13b-chat": {**_LLAMA_2, **_LLAMA_13B},
    "vicuna-7b": {**_LLAMA_1},
    "vicuna-13b": {**_LLAMA_1, **_LLAMA_13B},
    "billa-7b": {**_LLAMA_1, "vocab_size": 46943},
    "ziya-13b": {**_LLAMA_1, **_LLAMA_13B, "vocab_size": 39424},
}


@strict
class VideoLlamaVisionConfig(PreTrainedConfig):
    r"""
    Configuration of the frame encoder, EVA-CLIP's ViT-g/14 without its last block. The defaults are the published
    ones.

    Args:
        hidden_size (`int`, *optional*, defaults to 1408): Width of the transformer.
        intermediate_size (`int`, *optional*, defaults to 6144): Width of the feed-forward layers.
        num_hidden_layers (`int`, *optional*, defaults to 39): Number of transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): Number of attention heads.
        image_size (`int`, *optional*, defaults to 224): Height and width of a frame in pixels.
        patch_size (`int`, *optional*, defaults to 14): Height and width of a patch in pixels.
        num_channels (`int`, *optional*, defaults to 3): Colour channels of a frame.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the feed-forward layers (exact GELU).
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the layer norms inside the blocks.
        post_layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norm after the last block, which is BLIP-2's and differs from the blocks' own.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of the attention weights in training.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
    """

    model_type = "video_llama_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    post_layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    @property
    def num_patches(self) -> int:
        """Patches a frame is cut into."""
        return (self.image_size // self.patch_size) ** 2


@strict
class VideoLlamaQFormerConfig(Blip2QFormerConfig):
    r"""
    Configuration of the image Q-Former, with the published defaults. See [`Blip2QFormerConfig`] for the arguments, of
    which those of the text input are unused here.
    """

    model_type = "video_llama_qformer"
    base_config_key = "qformer_config"


@strict
class VideoLlamaVideoQFormerConfig(VideoLlamaQFormerConfig):
    r"""Configuration of the video Q-Former, with the published defaults: two layers, both with cross-attention."""

    model_type = "video_llama_video_qformer"
    base_config_key = "video_qformer_config"

    num_hidden_layers: int = 2
    cross_attention_frequency: int = 1
    encoder_hidden_size: int = 768


@strict
class VideoLlamaAudioQFormerConfig(VideoLlamaVideoQFormerConfig):
    r"""
    Configuration of the audio Q-Former, with the published defaults: as the video one, over ImageBind's vectors.
    """

    model_type = "video_llama_audio_qformer"
    base_config_key = "audio_qformer_config"

    encoder_hidden_size: int = 1024


@strict
class VideoLlamaAudioConfig(PreTrainedConfig):
    r"""
    Configuration of the sound encoder, ImageBind-Huge's audio tower. The defaults are the published ones.

    Args:
        hidden_size (`int`, *optional*, defaults to 768): Width of the transformer.
        intermediate_size (`int`, *optional*, defaults to 3072): Width of the feed-forward layers.
        num_hidden_layers (`int`, *optional*, defaults to 12): Number of transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 12): Number of attention heads.
        num_mel_bins (`int`, *optional*, defaults to 128): Mel bins of a clip's spectrogram.
        max_length (`int`, *optional*, defaults to 204): Time steps of a clip's spectrogram.
        patch_size (`int`, *optional*, defaults to 16): Height and width of a spectrogram patch.
        patch_stride (`int`, *optional*, defaults to 10): Step from one patch to the next; patches overlap.
        projection_dim (`int`, *optional*, defaults to 1024): Size of ImageBind's joint space.
        logit_scale_init_value (`float`, *optional*, defaults to 20.0):
            Factor by which the normalised vectors are multiplied; stored in the weights as its logarithm.
        max_source_positions (`int`, *optional*, defaults to 8):
            The largest number of clips of one sound: rows of the segment position table.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the feed-forward layers (exact GELU).
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the layer norms of blocks and head.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of the attention weights in training.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
    """

    model_type = "video_llama_audio"
    base_config_key = "audio_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_mel_bins: int = 128
    max_length: int = 204
    patch_size: int = 16
    patch_stride: int = 10
    projection_dim: int = 1024
    logit_scale_init_value: float | int = 20.0
    max_source_positions: int = 8
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    @property
    def num_patches(self) -> int:
        """Patches a clip's spectrogram is cut into (12 x 19 in the published model)."""
        rows = (self.num_mel_bins - self.patch_size) // self.patch_stride + 1
        columns = (self.max_length - self.patch_size) // self.patch_stride + 1
        return rows * columns


@strict
class VideoLlamaAudioVisionConfig(PreTrainedConfig):
    r"""
    Configuration of ImageBind-Huge's vision tower, on which the audio branch is trained. The defaults are the
    published ones.

    Args:
        hidden_size (`int`, *optional*, defaults to 1280): Width of the transformer.
        intermediate_size (`int`, *optional*, defaults to 5120): Width of the feed-forward layers.
        num_hidden_layers (`int`, *optional*, defaults to 32): Number of transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): Number of attention heads.
        image_size (`int`, *optional*, defaults to 224): Height and width of a frame in pixels.
        patch_size (`int`, *optional*, defaults to 14): Height and width of a patch in pixels.
        temporal_patch_size (`int`, *optional*, defaults to 2): Times a frame is repeated to fill a patch in time.
        num_channels (`int`, *optional*, defaults to 3): Colour channels of a frame.
        projection_dim (`int`, *optional*, defaults to 1024): Size of ImageBind's joint space.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the feed-forward layers (exact GELU).
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of every layer norm.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of the attention weights in training.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
    """

    model_type = "video_llama_audio_vision"
    base_config_key = "audio_vision_config"

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    temporal_patch_size: int = 2
    num_channels: int = 3
    projection_dim: int = 1024
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    @property
    def num_patches(self) -> int:
        """Patches a frame is cut into."""
        return (self.image_size // self.patch_size) ** 2


@strict
class VideoLlamaConfig(PreTrainedConfig):
    r"""
    Configuration of Video-LLaMA (arXiv 2306.02858). `VideoLlamaConfig()` is the published model with LLaMA-2-7B-Chat;
    [`VideoLlamaConfig.from_variant`] gives the published model with any of its decoders.

    Args:
        vision_config (`VideoLlamaVisionConfig` or `dict`, *optional*): The frame encoder.
        qformer_config (`VideoLlamaQFormerConfig` or `dict`, *optional*): The image Q-Former, run on every frame.
        video_qformer_config (`VideoLlamaVideoQFormerConfig` or `dict`, *optional*):
            The video Q-Former, run over all frames.
        audio_config (`VideoLlamaAudioConfig` or `dict`, *optional*):
            The sound encoder. `None` gives a model without an audio branch.
        audio_qformer_config (`VideoLlamaAudioQFormerConfig` or `dict`, *optional*): The audio Q-Former.
        audio_vision_config (`VideoLlamaAudioVisionConfig` or `dict`, *optional*, defaults to `None`):
            ImageBind's vision tower, needed only to train the audio branch on frames. `None` leaves it out.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to LLaMA-2-7B-Chat): The decoder.
        num_query_tokens (`int`, *optional*, defaults to 32): Tokens the image Q-Former gives for a frame.
        num_video_query_tokens (`int`, *optional*, defaults to 32):
            Soft tokens a video or an image takes in the prompt.
        num_audio_query_tokens (`int`, *optional*, defaults to 8): Soft tokens a sound takes in the prompt.
        max_frames (`int`, *optional*, defaults to 32): Rows of the frame position table.
        interpolate_frame_positions (`bool`, *optional*, defaults to `False`):
            Whether videos of more than `max_frames` frames are accepted, by stretching the position table linearly
            over them. Videos of up to `max_frames` frames are not changed by it.
        frame_chunk_size (`int`, *optional*, defaults to 64):
            Frames that pass the frame encoder at a time, which bounds its memory.
        image_token_id (`int`, *optional*, defaults to 32000): Id of an image's placeholder in `input_ids`.
        video_token_id (`int`, *optional*, defaults to 32001): Id of a video's placeholder in `input_ids`.
        audio_token_id (`int`, *optional*, defaults to 32002):
            Id of a sound's placeholder in `input_ids`. The three ids may lie past the decoder's vocabulary: they are
            never embedded.
        tie_word_embeddings (`bool`, *optional*): Whether the head shares the decoder's input embeddings. Follows
            `text_config` if not given.
        text_model (`str`, *optional*):
            Folder or Hub id of the decoder, for a checkpoint that leaves its weights out; `from_pretrained` puts them
            in.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.

    Raises:
        ValueError: if the sizes of two parts that meet do not agree; the message names both fields.

    Example:

    ```python
    >>> from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration

    >>> config = VideoLlamaConfig.from_variant("vicuna-7b")
    >>> config.text_config.max_position_embeddings
    2048
    ```"""

    model_type = "video_llama"
    _auto_class = "AutoConfig"
    # What is no prediction: batches have them of other media, or have none
    keys_to_ignore_at_inference = (
        ["past_key_values", "cache"]
        + [f"{modality}_hidden_states" for modality in ("image", "video", "audio")]
        + [f"{modality}_outputs" for modality in ("image", "video", "audio")]
    )
    sub_configs = {
        "vision_config": VideoLlamaVisionConfig,
        "qformer_config": VideoLlamaQFormerConfig,
        "video_qformer_config": VideoLlamaVideoQFormerConfig,
        "audio_config": VideoLlamaAudioConfig,
        "audio_qformer_config": VideoLlamaAudioQFormerConfig,
        "audio_vision_config": VideoLlamaAudioVisionConfig,
        "text_config": AutoConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    video_qformer_config: dict | PreTrainedConfig | None = None
    # `None` means "no audio branch" here, so the default is the empty dictionary: the published audio tower
    audio_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    audio_qformer_config: dict | PreTrainedConfig | None = None
    audio_vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    num_video_query_tokens: int = 32
    num_audio_query_tokens: int = 8
    max_frames: int = 32
    interpolate_frame_positions: bool = False
    frame_chunk_size: int = 64
    image_token_id: int = 32000
    video_token_id: int = 32001
    audio_token_id: int = 32002
    tie_word_embeddings: bool | None = None
    text_model: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = self._build(VideoLlamaVisionConfig, self.vision_config)
        self.qformer_config = self._build(
            VideoLlamaQFormerConfig, self.qformer_config, encoder_hidden_size=self.vision_config.hidden_size
        )
        self.video_qformer_config = self._build(
            VideoLlamaVideoQFormerConfig,
            self.video_qformer_config,
            encoder_hidden_size=self.qformer_config.hidden_size,
        )
        if self.audio_config is None:
            self.audio_qformer_config = None
            self.audio_vision_config = None
        else:
            self.audio_config = self._build(VideoLlamaAudioConfig, self.audio_config)
            self.audio_qformer_config = self._build(
                VideoLlamaAudioQFormerConfig,
                self.audio_qformer_config,
                encoder_hidden_size=self.audio_config.projection_dim,
            )
            if self.audio_vision_config is not None:
                self.audio_vision_config = self._build(VideoLlamaAudioVisionConfig, self.audio_vision_config)
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["llama"](**PUBLISHED_DECODERS["llama-2-7b-chat"])
        elif isinstance(self.text_config, dict):
            text_config = dict(self.text_config)
            self.text_config = CONFIG_MAPPING[text_config.pop("model_type", "llama")](**text_config)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if type(self).__module__.partition(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME:
            # The package registers its tasks, and `pipeline` asks for `trust_remote_code` wherever these are listed.
            pipelines = kwargs.pop("custom_pipelines", {})
            kwargs["custom_pipelines"] = {name: pipelines[name] for name in pipelines if name not in CUSTOM_PIPELINES}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in the library, with what makes a saved folder work without this package."""
        output = super().to_dict()
        output["auto_map"] = dict(AUTO_MAP)
        output["custom_pipelines"] = {**output.get("custom_pipelines", {}), **copy.deepcopy(CUSTOM_PIPELINES)}
        return output

    @staticmethod
    def _build(config_class: type, value: dict | PreTrainedConfig | None, **defaults: Any) -> PreTrainedConfig:
        """The sub-configuration that `value` describes; `defaults` stand in for what a dictionary leaves out."""
        if isinstance(value, PreTrainedConfig):
            return value
        return config_class(**{**defaults, **(value or {})})

    def validate_architecture(self) -> None:
        """Refuses sizes that do not fit together. Part of `PreTrainedConfig.validate`, run after construction."""
        vision, qformer, video = self.vision_config, self.qformer_config, self.video_qformer_config
        _require_equal("qformer_config.encoder_hidden_size", qformer.encoder_hidden_size,
                       "vision_config.hidden_size", vision.hidden_size)  # fmt: skip
        _require_equal("video_qformer_config.encoder_hidden_size", video.encoder_hidden_size,
                       "qformer_config.hidden_size", qformer.hidden_size)  # fmt: skip
        parts = {"vision_config": vision, "qformer_config": qformer, "video_qformer_config": video}
        patched = {"vision_config": vision}
        if self.audio_config is not None:
            audio, audio_qformer, audio_vision = self.audio_config, self.audio_qformer_config, self.audio_vision_config
            _require_equal("audio_qformer_config.encoder_hidden_size", audio_qformer.encoder_hidden_size,
                           "audio_config.projection_dim", audio.projection_dim)  # fmt: skip
            parts |= {"audio_config": audio, "audio_qformer_config": audio_qformer}
            if audio_vision is not None:
                _require_equal("audio_vision_config.projection_dim", audio_vision.projection_dim,
                               "audio_config.projection_dim", audio.projection_dim)  # fmt: skip
                parts["audio_vision_config"] = audio_vision
                patched["audio_vision_config"] = audio_vision
        for name, part in parts.items():
            _require_multiple(f"{name}.hidden_size", part.hidden_size,
                              f"{name}.num_attention_heads", part.num_attention_heads)  # fmt: skip
        for name, part in patched.items():
            _require_multiple(f"{name}.image_size", part.image_size, f"{name}.patch_size", part.patch_size)
        token_ids = {name: getattr(self, name) for name in ("image_token_id", "video_token_id", "audio_token_id")}
        for first, second in (("image_token_id", "video_token_id"), ("image_token_id", "audio_token_id"),
                              ("video_token_id", "audio_token_id")):  # fmt: skip
            if token_ids[first] == token_ids[second]:
                raise ValueError(f"`{first}` and `{second}` are both {token_ids[first]}: placeholders must differ.")
        for name in ("num_query_tokens", "num_video_query_tokens", "num_audio_query_tokens", "max_frames",
                     "frame_chunk_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")

    @classmethod
    def from_variant(cls, name: str, **kwargs: Any) -> "VideoLlamaConfig":
        """
        The configuration of a published checkpoint.

        Args:
            name (`str`): The decoder: one of `"llama-2-7b-chat"`, `"llama-2-13b-chat"`, `"vicuna-7b"`, `"vicuna-13b"`,
                `"billa-7b"`, `"ziya-13b"`.
            kwargs: Any argument of [`VideoLlamaConfig`], such as `audio_config=None` for a model that does not hear.

        Returns:
            `VideoLlamaConfig`: with the placeholders right after the decoder's vocabulary.

        Raises:
            ValueError: for any other name.
        """
        if name not in PUBLISHED_DECODERS:
            raise ValueError(f"There is no published variant {name!r}: choose one of {', '.join(PUBLISHED_DECODERS)}.")
        text_config = CONFIG_MAPPING["llama"](**PUBLISHED_DECODERS[name])
        placeholders = ("image_token_id", "video_token_id", "audio_token_id")
        token_ids = {key: text_config.vocab_size + i for i, key in enumerate(placeholders)}
        return cls(**{"text_config": text_config, **token_ids, **kwargs})


def _require_equal(name: str, value: int, other_name: str, other_value: int) -> None:
    if value != other_value:
        raise ValueError(f"`{name}` is {value} but `{other_name}` is {other_value}: they must be equal.")


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor != 0:
        raise ValueError(f"`{name}` is {value}, which is not a multiple of `{divisor_name}`, {divisor}.")


__all__ = [
    "PUBLISHED_DECODERS",
    "VideoLlamaAudioConfig",
    "VideoLlamaAudioQFormerConfig",
    "VideoLlamaAudioVisionConfig",
    "VideoLlamaConfig",
    "VideoLlamaQFormerConfig",
    "VideoLlamaVideoQFormerConfig",
    "VideoLlamaVisionConfig",
]
