"""The configuration of a converted model: sizes read off the weights, and what the decoder's folder says.

Used by `convert_video_llama_checkpoint.py` once it knows where every parameter comes from (`weight_plan.py`).
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from weight_files import ConversionError, first_line, read_json
from weight_plan import Plan, check_resolution, count_layers, layer_number

from transformers_videollama import VideoLlamaConfig

logger = logging.getLogger("convert_video_llama_checkpoint")

# Attention heads cannot be read off the weights. These are the published ones, by the width of the part.
PUBLISHED_HEADS = {
    "vision_config": {1408: 16},
    "qformer_config": {768: 12},
    "audio_config": {768: 12},
    "audio_vision_config": {1280: 16},
}
# Parts of other widths are reduced models, made for tests. A `meta.json` beside such files gives their heads under
# these names; without one they are taken to have `REDUCED_HEADS`.
META_HEADS = {
    "vision_config": "v_heads",
    "qformer_config": "q_heads",
    "audio_config": "ib_a_heads",
    "audio_vision_config": "ib_v_heads",
}
REDUCED_HEADS = 4

IMAGE_SIZE = 224

# The words that tell the family of prompts, in the names of published decoders and of their training configurations.
FAMILY_WORDS = {
    "vicuna": ("vicuna", "billa", "ziya"),
    "llama_2": ("llama-2", "llama_2", "llama2", "llama_v2", "llama-v2"),
}


def find_decoder_files(folders: list[Path], pattern: str) -> Path | None:
    """The first of the decoder's folders that has a file of this pattern."""
    return next((folder for folder in folders if any(folder.glob(pattern))), None)


def load_text_config(folders: list[Path], plan: Plan) -> PreTrainedConfig:
    """
    The decoder's configuration.

    Args:
        folders (`list[Path]`): The folder of the difference, if one is added, and the decoder's.
        plan (`Plan`): Where every parameter comes from; with a difference the decoder may have more rows.

    Raises:
        ConversionError: if there is none, or none that `transformers` knows.
    """
    folder = find_decoder_files(folders, "config.json")
    if folder is None:
        is_original = find_decoder_files(folders, "params.json") is not None
        form = (
            "in Meta's own format, which a script of `transformers` converts" if is_original else "no decoder's folder"
        )
        raise ConversionError(f"--llama {folders[-1]} has no config.json: it is {form}.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ConversionError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from error
    embeddings = plan.get("model.language_model.embed_tokens.weight")
    if embeddings is not None and embeddings.delta is not None and folder != folders[0]:
        config.vocab_size = embeddings.shape[0]
    return config


def load_tokenizer(folders: list[Path], text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The decoder's tokenizer, with a padding token; `folders` as for `load_text_config`."""
    folder = find_decoder_files(folders, "tokenizer*") or folders[-1]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ConversionError(
            f"{folder}: its tokenizer cannot be loaded ({first_line(error)}). The folder must hold tokenizer.json, or "
            "tokenizer.model, which needs the packages sentencepiece and protobuf."
        ) from error
    if tokenizer.pad_token is None:
        if len(folders) == 2 and folder == folders[-1] and text_config.vocab_size == len(tokenizer) + 1:
            # Vicuna v0: the row that its difference adds to LLaMA's embeddings
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        else:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def choose_family(folders: list[Path], text_config: PreTrainedConfig, training_configs: list[dict]) -> str:
    """
    The family of prompts (`"vicuna"`, `"llama_2"` or `"plain"`) that the decoder knows, judging by the names in the
    configurations saved with the branches and those of the decoder's folder.

    Raises:
        ConversionError: if the decoder is Vicuna v1.1 or later where the published v0 is needed.
    """
    names = []
    for config in training_configs:
        model = config.get("model")
        if isinstance(model, dict):
            names += [str(model[key]) for key in ("model_type", "llama_model") if key in model]
    for folder in folders:
        names.append(folder.resolve().name)
        config_file = folder / "config.json"
        if config_file.is_file():
            names.append(str(read_json(config_file).get("_name_or_path", "")))
    names = [Path(name).name.lower() for name in names]
    for name in names:
        for family, words in FAMILY_WORDS.items():
            if any(word in name for word in words):
                if "vicuna" in name:
                    _check_vicuna_version(names, text_config.vocab_size)
                logger.info("The prompts are those of the family %s, judging by the name %r.", family, name)
                return family
    logger.warning(
        "No name tells which prompts this decoder knows, so they are plain ones. If it is one of the published "
        "decoders, state its family with --family: vicuna (BiLLA and Ziya too) or llama_2."
    )
    return "plain"


def _check_vicuna_version(names: list[str], vocab_size: int) -> None:
    """
    The published branches belong to Vicuna v0, which ends turns with `###` and has one row more than LLaMA, for
    `[PAD]`. Later versions end them with `</s>` and do not have it.
    """
    later = next((name for name in names if re.search(r"vicuna.*v1[._][1-9]", name)), None)
    if later is not None:
        evidence = f"the name {later!r} says so"
    elif vocab_size == 32000:
        evidence = "its vocabulary has 32000 rows, where v0 has 32001"
    else:
        return
    raise ConversionError(
        f"The decoder is Vicuna v1.1 or later, or LLaMA itself ({evidence}), where the published files need v0. "
        "Give LLaMA as --llama and v0's difference as --llama-delta, or --family vicuna if the decoder is right."
    )


def read_meta_heads(paths: Iterable[Path]) -> dict[str, int]:
    """Attention heads by part, from a `meta.json` beside one of the files; empty if there is none."""
    for path in paths:
        meta_file = path.parent / "meta.json"
        if meta_file.is_file():
            sizes = read_json(meta_file).get("config", {})
            return {part: sizes[name] for part, name in META_HEADS.items() if name in sizes}
    return {}


# The parameters that sizes are read off, by the part of the model.
VIT_SIZES = ("embeddings.class_embedding", "embeddings.position_embedding", "embeddings.patch_embedding.weight",
             "encoder.layers.0.mlp.fc1.weight")  # fmt: skip
QFORMER_SIZES = ("layernorm.weight", "encoder.layer.0.intermediate_query.dense.weight",
                 "encoder.layer.0.crossattention.attention.key.weight")  # fmt: skip


def read_for_config(plan: Plan) -> list[str]:
    """The parameters that `infer_config` needs to see."""
    names = [f"model.vision_tower.{name}" for name in VIT_SIZES] + ["model.vision_tower.post_layernorm.weight"]
    names += ["model.query_tokens"] + [f"model.qformer.{name}" for name in QFORMER_SIZES]
    branches = ["video"]
    if any(name.startswith("model.audio_branch.") for name in plan):
        branches.append("audio")
        names += [f"model.audio_tower.{name}" for name in (*VIT_SIZES, "projection.weight")]
    for branch in branches:
        names += [
            f"model.{branch}_branch.{name}"
            for name in ("query_tokens", "position_embedding.weight", *(f"qformer.{name}" for name in QFORMER_SIZES),
                         "projector.weight")
        ]  # fmt: skip
    if any(name.startswith("model.audio_vision_tower.") for name in plan):
        names += [f"model.audio_vision_tower.{name}" for name in (*VIT_SIZES, "projection.weight")]
    return [*names, "model.language_model.embed_tokens.weight"]


def infer_config(
    plan: Plan,
    text_config: PreTrainedConfig,
    placeholder_ids: dict[str, int],
    meta_heads: dict[str, int],
    overrides: dict[str, Any],
) -> VideoLlamaConfig:
    """
    The configuration of the model that has the plan's shapes.

    Args:
        plan (`Plan`): Where every parameter comes from.
        text_config (`PreTrainedConfig`): The decoder's configuration.
        placeholder_ids (`dict[str, int]`): `image_token_id`, `video_token_id` and `audio_token_id`.
        meta_heads (`dict[str, int]`): Attention heads by part, from `read_meta_heads`.
        overrides (`dict[str, Any]`): Fields of `VideoLlamaConfig`, nested, that count more than what is inferred.

    Raises:
        ConversionError: if the files do not fit together, or an encoder is of another resolution.
    """

    def vit(tower: str, part: str) -> dict[str, Any]:
        width = plan[f"{tower}.embeddings.class_embedding"].shape[-1]
        return {
            "hidden_size": width,
            "intermediate_size": plan[f"{tower}.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": count_layers(plan, f"{tower}.encoder.layers."),
            "num_attention_heads": choose_heads(part, part, width, meta_heads, overrides),
            "patch_size": plan[f"{tower}.embeddings.patch_embedding.weight"].shape[-1],
        }

    def qformer(prefix: str, part: str) -> dict[str, Any]:
        layers = f"{prefix}.encoder.layer."
        num_layers = count_layers(plan, layers)
        names = [name for name in plan if name.startswith(layers)]
        crossing = {layer_number(name, layers) for name in names if ".crossattention." in name}
        width = plan[f"{prefix}.layernorm.weight"].shape[0]
        return {
            "hidden_size": width,
            "intermediate_size": plan[f"{layers}0.intermediate_query.dense.weight"].shape[0],
            "num_hidden_layers": num_layers,
            "num_attention_heads": choose_heads(part, "qformer_config", width, meta_heads, overrides),
            "cross_attention_frequency": min(crossing - {0}, default=num_layers),
            "encoder_hidden_size": plan[f"{layers}0.crossattention.attention.key.weight"].shape[1],
        }

    values: dict[str, Any] = {
        "vision_config": vit("model.vision_tower", "vision_config") | {"image_size": IMAGE_SIZE},
        "qformer_config": qformer("model.qformer", "qformer_config"),
        "video_qformer_config": qformer("model.video_branch.qformer", "video_qformer_config"),
        "audio_config": None,
        "text_config": text_config,
        "num_query_tokens": plan["model.query_tokens"].shape[1],
        "num_video_query_tokens": plan["model.video_branch.query_tokens"].shape[1],
        "max_frames": plan["model.video_branch.position_embedding.weight"].shape[0],
        **placeholder_ids,
    }
    if "model.audio_branch.query_tokens" in plan:
        values["audio_config"] = vit("model.audio_tower", "audio_config") | {
            "projection_dim": plan["model.audio_tower.projection.weight"].shape[0],
            "max_source_positions": plan["model.audio_branch.position_embedding.weight"].shape[0],
        }
        values["audio_qformer_config"] = qformer("model.audio_branch.qformer", "audio_qformer_config")
        values["num_audio_query_tokens"] = plan["model.audio_branch.query_tokens"].shape[1]
    if "model.audio_vision_tower.embeddings.class_embedding" in plan:
        values["audio_vision_config"] = vit("model.audio_vision_tower", "audio_vision_config") | {
            "image_size": IMAGE_SIZE,
            "temporal_patch_size": plan["model.audio_vision_tower.embeddings.patch_embedding.weight"].shape[2],
            "projection_dim": plan["model.audio_vision_tower.projection.weight"].shape[0],
        }
    try:
        _check_fields(VideoLlamaConfig(**values), overrides)
        config = VideoLlamaConfig(**_merge(values, overrides))
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = first_line(error.__cause__ or error)
        raise ConversionError(f"The files, or --config, do not fit together: {reason}") from error
    for tower, part in (("vision_tower", config.vision_config), ("audio_vision_tower", config.audio_vision_config)):
        if part is not None:
            check_resolution(plan, f"model.{tower}", part.num_patches + 1, part.image_size, part.patch_size)
    return config


def choose_heads(part: str, kind: str, width: int, meta_heads: dict[str, int], overrides: dict[str, Any]) -> int:
    """
    Attention heads of a part: stated by the user, by a `meta.json`, published for this width, or `REDUCED_HEADS`.
    """
    stated = (overrides.get(part) or {}).get("num_attention_heads", meta_heads.get(kind))
    if stated is not None:
        return stated
    if width in PUBLISHED_HEADS[kind]:
        return PUBLISHED_HEADS[kind][width]
    logger.warning(
        "%s: no published model is %d wide, and weights do not tell the number of attention heads. %d are assumed; "
        "state "
        "another number with --config '{\"%s\": {\"num_attention_heads\": ...}}'.",
        part, width, REDUCED_HEADS, part,
    )  # fmt: skip
    return REDUCED_HEADS


def choose_dtype(dtype: str, text_config: PreTrainedConfig, plan: Plan) -> torch.dtype:
    """The dtype to write in; `"auto"` is the decoder's, as its configuration states it or else its weights have it."""
    if dtype == "auto":
        return text_config.dtype or plan["model.language_model.embed_tokens.weight"].dtype
    return getattr(torch, dtype)


def _check_fields(config: PreTrainedConfig | None, overrides: dict[str, Any], name: str = "VideoLlamaConfig") -> None:
    """Refuses overrides of fields that the configuration does not have."""
    for field, value in overrides.items():
        if not hasattr(config, field):
            raise ConversionError(f"--config: {name} of this model has no field {field!r}.")
        if isinstance(value, dict):
            _check_fields(getattr(config, field), value, field)


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with the fields of `overrides` in their place, dictionaries field by field."""
    merged = dict(values)
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            value = _merge(merged[name], value)
        elif isinstance(value, dict) and isinstance(merged.get(name), PreTrainedConfig):
            value = _merge(merged[name].to_dict(), value)
        merged[name] = value
    return merged
