"""A model's trained part: a checkpoint of the video branch, the audio branch or both, which loads onto the frozen
parts.

As a rule the branches alone are trained, so this is all that a training run has to keep: some hundred megabytes in
place of the whole model. Other parts that were trained are kept in the same way. A folder of this form holds
`trained_part.safetensors`, with the tensors under the model's own names, and `trained_part.json`, which names the
model that they belong to and the sizes that must fit.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import ProcessorMixin
from transformers.utils import ADAPTER_CONFIG_NAME, cached_file, logging

from .files import give_usual_permissions
from .model_card import describe_decoder, make_model_card
from .modeling_video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel

logger = logging.get_logger(__name__)

WEIGHTS_NAME = "trained_part.safetensors"
DESCRIPTION_NAME = "trained_part.json"
BRANCHES = ("video_branch", "audio_branch")
# Sound is never read in training, and ImageBind's towers must stay in their common space: they are not among these
PARTS = (*BRANCHES, "vision_tower", "qformer", "language_model")

Model = VideoLlamaForConditionalGeneration | VideoLlamaModel


def save_trained_part(
    model: Model,
    directory: str | os.PathLike,
    parts: list[str] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """
    Saves the trained parts of a model.

    Files are written under another name first, so that a folder never holds half of one.

    Args:
        model (`VideoLlamaForConditionalGeneration` or `VideoLlamaModel`): The model.
        directory (`str` or `os.PathLike`): The folder, made if need be.
        parts (`list[str]`, *optional*):
            Some of `"video_branch"`, `"audio_branch"`, `"vision_tower"`, `"qformer"` (with `query_tokens`) and
            `"language_model"` (with the head). By default the branches with parameters that require a gradient or, in
            a model without any, all branches that it has.
        base_model (`str`, *optional*):
            Folder or Hub id of the model with the frozen parts. By default where `model` was loaded from.
        base_revision (`str`, *optional*): Its revision on the Hub.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            Whole tensors by their names in `model`, if those in `model` itself are sharded over processes.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if the model has no such part.
    """
    if parts is None:
        found = {name: part for name in PARTS if (part := _part(model, name)) is not None}
        gradients = {
            name: {p.requires_grad for own, p in part.named_parameters() if ".lora_" not in own}
            for name, part in found.items()
        }
        trained = [name for name, own in gradients.items() if True in own]
        # A model of which nothing was frozen is one that nobody has said of what is to be trained
        is_chosen = trained and any(False in own for own in gradients.values())
        parts = trained if is_chosen else [name for name in found if name in BRANCHES]
    tensors: dict[str, torch.Tensor] = {}
    for name in parts:
        if _part(model, name) is None:
            raise ValueError(_missing_part(name))
        tensors |= _part_tensors(model, name)
    if state_dict is not None:
        prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
        tensors = {name: state_dict[name if name.startswith("lm_head.") else prefix + name] for name in tensors}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    decoder_name, _, decoder_terms = describe_decoder(model.config)
    frozen = {
        "vision_tower": "EVA-CLIP ViT-g/14, MIT",
        "qformer": "BLIP-2, BSD-3-Clause",
        **({"audio_tower": "ImageBind-Huge, CC-BY-NC 4.0"} if "audio_branch" in parts else {}),
        "language_model": f"{decoder_name}, {decoder_terms}",
    }
    base_model = base_model or model.config._name_or_path or None
    if base_model is not None and os.path.isdir(base_model):
        base_model = os.path.abspath(base_model)  # so that it is found from elsewhere
    description = {
        "parts": list(parts),
        "base_model": base_model,
        "base_revision": base_revision,
        "frozen_parts": {name: terms for name, terms in frozen.items() if name not in parts},
        "sizes": _sizes(model.config, parts),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _write_description(folder, description)
    return folder


def load_trained_part(model: Model, path_or_repo_id: str | os.PathLike, **kwargs: Any) -> list[str]:
    """
    Loads trained parts onto a model, in place. Parts that are not in the file keep their weights, so that a video and
    an audio branch can be loaded one after the other.

    Args:
        model (`VideoLlamaForConditionalGeneration` or `VideoLlamaModel`): The model.
        path_or_repo_id (`str` or `os.PathLike`): A folder made by [`save_trained_part`], or a repository of the Hub.
        kwargs: Where the Hub is concerned, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`,
            `subfolder`.

    Returns:
        `list[str]`: the parts that were loaded.

    Raises:
        OSError: if there is no such folder or repository, or if it holds no trained part.
        ValueError: if a size does not fit, which the message names, or if tensors are missing or unknown. Nothing is
            loaded then.
    """
    description = _read_description(path_or_repo_id, **kwargs)
    parts = description["parts"]
    for name in parts:
        if _part(model, name) is None:
            raise ValueError(f"{path_or_repo_id}: {_missing_part(name)}")
    _check_sizes(path_or_repo_id, description, model)

    targets = {key: tensor for name in parts for key, tensor in _part_tensors(model, name).items()}
    offloaded = sorted(name for name, tensor in targets.items() if tensor.is_meta)
    if offloaded:
        raise ValueError(
            f"The model's {offloaded[0]} and {len(offloaded) - 1} more tensors are offloaded or not loaded: load the "
            "trained part onto a model that is in memory."
        )
    weights = cached_file(path_or_repo_id, WEIGHTS_NAME, **kwargs)
    with safe_open(weights, framework="pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _check_tensors(weights, shapes, targets)
        with torch.no_grad():
            for name, target in targets.items():
                tensor = file.get_tensor(name)
                if isinstance(target, DTensor):
                    tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
                target.copy_(tensor)
    return parts


def from_trained_part(
    path_or_repo_id: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> VideoLlamaForConditionalGeneration:
    """
    Loads a whole model from its trained part and the model with the frozen parts, which the trained part names. An
    adapter that lies beside it is left to `model.load_adapter`.

    Args:
        path_or_repo_id (`str` or `os.PathLike`): The trained part: a folder, or a repository of the Hub.
        base_model (`str` or `os.PathLike`, *optional*): Another model with the frozen parts than the one named.
        revision (`str`, *optional*): Revision of the trained part.
        token (`str` or `bool`, *optional*): Token for the Hub, for both.
        kwargs:
            Arguments of `VideoLlamaForConditionalGeneration.from_pretrained`: `dtype`, `device_map`, …; `cache_dir`,
            `force_download` and `local_files_only` are for both.

    Raises:
        ValueError: if no base model is named or if the parts do not fit, see [`load_trained_part`].
    """
    shared = {name: kwargs[name] for name in ("cache_dir", "force_download", "local_files_only") if name in kwargs}
    hub_options = {"revision": revision, "token": token, **shared}
    description = _read_description(path_or_repo_id, **hub_options)
    base_revision = None
    if base_model is None:
        base_model, base_revision = description["base_model"], description["base_revision"]
    if base_model is None:
        raise ValueError(
            f"{path_or_repo_id} does not name the model with its frozen parts: give it as `base_model=…`. It needs "
            f"{', '.join(description['frozen_parts'].values())}."
        )
    if base_revision is not None:
        kwargs.setdefault("revision", base_revision)
    model = VideoLlamaForConditionalGeneration.from_pretrained(base_model, token=token, **kwargs)
    load_trained_part(model, path_or_repo_id, **hub_options)
    options = {**hub_options, "_raise_exceptions_for_missing_entries": False}
    if cached_file(path_or_repo_id, ADAPTER_CONFIG_NAME, **options) is not None:
        name = os.fspath(path_or_repo_id)
        logger.warning(
            f"{name} holds a LoRA adapter beside the trained part, which is not loaded: "
            f"`model.load_adapter({name!r})` loads it."
        )
    return model


def push_trained_part_to_hub(
    model: Model,
    repo_id: str,
    parts: list[str] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    commit_message: str = "Upload trained part",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    processor: ProcessorMixin | None = None,
) -> CommitInfo:
    """
    Uploads the trained parts of a model in one commit, with a model card if the repository has none.

    Args:
        model, parts, base_model, base_revision: As for [`save_trained_part`].
        repo_id (`str`): The repository, made if need be.
        commit_message, private, token, revision, create_pr: As for the library's `push_to_hub`.
        processor (`ProcessorMixin`, *optional*): Uploaded with them, for `AutoProcessor.from_pretrained(repo_id)`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        save_trained_part(model, directory, parts, base_model, base_revision)
        description = _read_description(directory)
        base_model = description["base_model"]
        if base_model is None or os.path.isdir(base_model):
            logger.warning(
                f"{repo_id} names {base_model or 'nothing'} as the model with its frozen parts, which others do not "
                "have: name one on the Hub as `base_model=…`."
            )
            base_model = description["base_model"] = None
            _write_description(directory, description)
        if processor is not None:
            processor.save_pretrained(directory)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            card = make_model_card(model.config, repo_id, trained_parts=description["parts"], base_model=base_model)
            card.save(Path(directory) / "README.md")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _part(model: Model, name: str) -> torch.nn.Module | None:
    return getattr(getattr(model, model.base_model_prefix, model), name, None) if name in PARTS else None


def _part_tensors(model: Model, name: str) -> dict[str, torch.Tensor]:
    """A part's tensors under the names of `VideoLlamaModel`, with what belongs to the part but is not inside of it."""
    base: Any = getattr(model, model.base_model_prefix, model)
    tensors = {f"{name}.{key}": tensor for key, tensor in getattr(base, name).state_dict().items()}
    if name == "qformer":
        tensors["query_tokens"] = base.query_tokens
    head = getattr(model, "lm_head", None)
    if name == "language_model" and head is not None and head.weight is not base.get_input_embeddings().weight:
        tensors["lm_head.weight"] = head.weight
    return tensors


def _missing_part(name: str) -> str:
    if name == "audio_branch":
        return "it is about the audio branch, which this model lacks (`config.audio_config` is None)."
    return f"there is no part {name!r}: choose from {', '.join(PARTS)}."


def _sizes(config: Any, parts: list[str]) -> dict[str, int]:
    """The sizes that a branch shares with the frozen parts, and its own, by their names in the configuration."""
    sizes = {"text_config.hidden_size": config.text_config.hidden_size}
    if "video_branch" in parts:
        sizes |= {
            "qformer_config.hidden_size": config.qformer_config.hidden_size,
            "video_qformer_config.hidden_size": config.video_qformer_config.hidden_size,
            "video_qformer_config.num_hidden_layers": config.video_qformer_config.num_hidden_layers,
            "num_video_query_tokens": config.num_video_query_tokens,
            "max_frames": config.max_frames,
        }
    if "audio_branch" in parts:
        sizes |= {
            "audio_config.projection_dim": config.audio_config.projection_dim,
            "audio_config.max_source_positions": config.audio_config.max_source_positions,
            "audio_qformer_config.hidden_size": config.audio_qformer_config.hidden_size,
            "audio_qformer_config.num_hidden_layers": config.audio_qformer_config.num_hidden_layers,
            "num_audio_query_tokens": config.num_audio_query_tokens,
        }
    return sizes


def _check_sizes(source: str | os.PathLike, description: dict[str, Any], model: Model) -> None:
    made_for = description["sizes"]
    has = _sizes(model.config, description["parts"])
    wrong = [
        f"`{name}` {made_for[name]}, not {has[name]}" for name in has if made_for.get(name, has[name]) != has[name]
    ]
    if not wrong:
        return
    hint = ""
    name = "text_config.hidden_size"
    if made_for.get(name, has[name]) != has[name]:
        billions = {4096: "7B", 5120: "13B"}
        names = [billions.get(width, f"{width} wide") for width in (made_for[name], has[name])]
        hint = f" It was made for a {names[0]} decoder, and this model's is {names[1]}."
    raise ValueError(f"{os.fspath(source)} does not fit this model. It needs {'; '.join(wrong)}.{hint}")


def _check_tensors(source: str, shapes: dict[str, list[int]], targets: dict[str, torch.Tensor]) -> None:
    problems = []
    missing = sorted(set(targets) - set(shapes))
    unexpected = sorted(set(shapes) - set(targets))
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unknown: {_some(unexpected)}")
    for name in sorted(set(shapes) & set(targets)):
        if shapes[name] != list(targets[name].shape):
            problems.append(f"{name} has shape {shapes[name]}, but the model's has {list(targets[name].shape)}")
    if problems:
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _read_description(path_or_repo_id: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
    path = cached_file(path_or_repo_id, DESCRIPTION_NAME, **kwargs)
    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the trained part again.") from error
    wanted = ("parts", "base_model", "base_revision", "frozen_parts", "sizes")
    missing = [name for name in wanted if name not in description]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was not written by `save_trained_part`.")
    return description


def _write_description(directory: str | os.PathLike, description: dict[str, Any]) -> None:
    text = json.dumps(description, indent=2) + "\n"
    _replace(Path(directory) / DESCRIPTION_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Any) -> None:
    """Has `write` write a file beside `path`, and puts it in the place of `path` when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        give_usual_permissions(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


__all__ = ["from_trained_part", "load_trained_part", "push_trained_part_to_hub", "save_trained_part"]
