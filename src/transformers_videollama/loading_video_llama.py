"""What `from_pretrained` does differently for Video-LLaMA: checkpoints without their decoder, adapters, and a decoder
that alone is quantised."""

import copy
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_video_llama import VideoLlamaConfig

# Arguments of `from_pretrained` that say where and how to fetch a file
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class VideoLlamaLoadingMixin:
    """Comes before [`PreTrainedModel`], whose `from_pretrained` does the rest."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *args: Any,
        quantization_config: QuantizationConfigMixin | dict | None = None,
        text_model: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        See [`PreTrainedModel.from_pretrained`]. A `quantization_config` that names no modules to skip quantises the
        decoder alone: the encoders, the branches and the head are kept as they are. The name of an adapter loads the
        model that it was trained on, with the adapter; `revision` is then the adapter's.

        Args:
            text_model (`str` or `os.PathLike`, *optional*):
                For a checkpoint that leaves the decoder out, the folder or Hub id where the decoder is; by default the
                one that its configuration names as `text_model`. `save_pretrained` then writes the whole model.
        """
        if quantization_config is not None:
            quantization_config = _skip_media_parts(quantization_config)
        kwargs["quantization_config"] = quantization_config
        adapter_options = kwargs.get("adapter_kwargs") or {}
        if "_adapter_model_path" in adapter_options:  # of which an Auto class was given the name
            hub_options = {name: adapter_options[name] for name in _HUB_OPTIONS if name in adapter_options}
            _refuse_trained_part(adapter_options["_adapter_model_path"], **hub_options)
        config = given = kwargs.pop("config", None)
        if config is None and pretrained_model_name_or_path is not None:
            hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            adapter = _read_adapter_config(pretrained_model_name_or_path, **hub_options)
            if adapter is not None:
                return cls._from_pretrained_with_adapter(
                    pretrained_model_name_or_path, adapter, *args, text_model=text_model, **kwargs
                )
            config = VideoLlamaConfig.from_pretrained(pretrained_model_name_or_path, **hub_options)
        text_model = text_model or getattr(config, "text_model", None)
        if text_model is None or pretrained_model_name_or_path is None:
            return super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, config=given, **kwargs
            )
        if given is None:  # what belongs to the configuration is set there, as the library does, except for the dtype
            dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, kwargs = VideoLlamaConfig.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs |= hub_options | dtype
        return cls._from_pretrained_with_decoder(pretrained_model_name_or_path, config, text_model, **kwargs)

    @classmethod
    def _from_pretrained_with_adapter(
        cls, name: str | os.PathLike, adapter: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Loads the model that an adapter's configuration names, and the adapter onto it."""
        adapter_options = {option: kwargs[option] for option in _HUB_OPTIONS if option in kwargs}
        _refuse_trained_part(name, **adapter_options)
        base_model = adapter.get("base_model_name_or_path")
        if not base_model:
            raise ValueError(
                f"{name} does not name the model that its adapter is for: load that model, and the adapter by "
                f"`model.load_adapter({os.fspath(name)!r})`."
            )
        kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        loaded = cls.from_pretrained(base_model, *args, revision=adapter.get("revision"), **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_adapter(name, adapter_kwargs=adapter_options)
        return loaded

    @classmethod
    def _from_pretrained_with_decoder(
        cls, name: str | os.PathLike, config: VideoLlamaConfig, text_model: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint without decoder and the decoder; the options of the Hub are those of the former."""
        hub_options = {option: kwargs.pop(option) for option in _HUB_OPTIONS if option in kwargs}
        adapter_options = dict(kwargs.pop("adapter_kwargs", None) or {})
        weights = load_file(cached_file(name, SAFE_WEIGHTS_NAME, **hub_options))
        decoder_options = {key: value for key, value in hub_options.items() if key not in ("revision", "subfolder")}
        for path in _safetensors_files(text_model, **decoder_options):
            for key, tensor in load_file(path).items():
                weights[key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key] = (
                    tensor
                )
        model = super().from_pretrained(None, state_dict=weights, config=config, **kwargs)  # type: ignore[misc]
        model.name_or_path = model.config._name_or_path = os.fspath(name)
        model.config.text_model = None  # saved, the model has its decoder, which may have been trained since
        if model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(name, **hub_options)
        adapter = adapter_options.pop("_adapter_model_path", None)
        if adapter is not None:  # of which an Auto class was given the name
            model.load_adapter(adapter, adapter_kwargs=adapter_options)
        return model


def _safetensors_files(name: str | os.PathLike, **hub_options: Any) -> list[str]:
    """The weight files of a checkpoint, in one or several shards."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub_options)
    if index is None:
        return [cached_file(name, SAFE_WEIGHTS_NAME, **hub_options)]
    return get_checkpoint_shard_files(name, index, **hub_options)[0]


def _read_adapter_config(name: str | os.PathLike, **hub_options: Any) -> dict[str, Any] | None:
    """The configuration of the adapter of this name, or `None` if it is the name of a model."""
    if cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_options) is not None:
        return None
    path = cached_file(name, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_options)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _refuse_trained_part(name: str | os.PathLike, **hub_options: Any) -> None:
    """Refuses an adapter that is but half of what was trained."""
    if cached_file(name, "trained_part.json", _raise_exceptions_for_missing_entries=False, **hub_options) is not None:
        raise ValueError(
            f"{os.fspath(name)} holds trained branches beside its adapter: load both, with `from_trained_part` and "
            "then `model.load_adapter`."
        )


def _skip_media_parts(config: QuantizationConfigMixin | dict) -> QuantizationConfigMixin:
    """
    A copy of a quantisation configuration that leaves everything but the decoder alone, unless it says what to skip.
    """
    parts = ["vision_tower", "qformer", "video_branch", "audio_tower", "audio_branch", "audio_vision_tower"]
    skipped = ["lm_head", *parts, *(f"model.{part}" for part in parts)]
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    # Every method has its own name for the same list
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if getattr(config, name, ()) in (None, ["lm_head"]):
            setattr(config, name, skipped)
    return config


__all__ = ["VideoLlamaLoadingMixin"]
