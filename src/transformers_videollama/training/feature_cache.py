"""The feature cache: what the frozen encoders make of a data set's media, computed once and read in place of the media.

The encoders are never trained, so that without augmentation every epoch computes the same features again. `main` (the
command `examples/training/cache_features.py`) and [`cache_features`] write them; [`FeatureCache`] gives them to
`samples.py`. A cache is a folder:

    meta.json              what it was made with: encoders (a fingerprint of their weights), sampling, processor settings
    plan.jsonl             which media belong to which shard, one shard a line
    shard-00000.safetensors    "frames" (rows, num_query_tokens, width), "clips" (rows, projection_dim), "sound" (rows,
                               projection_dim), whichever kinds were asked for, and "timestamps" (rows): the frames of the
                               shard's media one after the other
    shard-00000.jsonl          its media in that order, with their numbers of rows, or with what is wrong with the file
    unreadable.txt         the media that could not be read, and why

A shard is computed as a whole, in batches that do not depend on what was computed before, and its index is written last.
Hence an interrupted run is continued by the same command, any number of processes may share the work, and the features are
the same bits in every case.
"""

import argparse
import hashlib
import json
import mimetypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import yaml
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from ..media import MediaError, has_audio, open_media
from ..modeling_video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel
from ..processing_video_llama import VideoLlamaProcessor, _image, _timestamps
from ..video_processing_video_llama import is_frame
from .annotations import load_annotations
from .arguments import check_datasets

logger = logging.get_logger(__name__)

META_NAME = "meta.json"
PLAN_NAME = "plan.jsonl"
UNREADABLE_NAME = "unreadable.txt"
TEMPORARY_SUFFIX = ".tmp"
KINDS = ("frames", "clips", "sound")
PROCESS_TIMEOUT = timedelta(days=7)  # processes wait for the slowest one at the end

# The parts of `VideoLlamaModel` that make the features of each kind
_ENCODERS = {
    "frames": ("vision_tower", "query_tokens", "qformer"),
    "clips": ("audio_vision_tower",),
    "sound": ("audio_tower",),
}
# What decides about the pixels of frames and images
_PICTURE_SETTINGS = (
    "size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"
)  # fmt: skip
# What decides about the log-mel clips
_SOUND_SETTINGS = (
    "feature_size", "sampling_rate", "padding_value", "num_clips", "clip_duration", "num_mel_frames", "frame_length",
    "frame_shift", "preemphasis", "min_frequency", "mel_floor", "mean", "std"
)  # fmt: skip

Model = VideoLlamaForConditionalGeneration | VideoLlamaModel


# ---------------------------------------------------------------------------------------------------------------------
# What a cache was made with


def encoder_fingerprint(model: Model, kind: str) -> str | None:
    """
    A hash of the weights that make the features of a kind, the same for a model loaded in float32 or in bfloat16.

    Returns:
        `str`: 32 hexadecimal digits; None if the model is without these encoders (training from a cache does not need
        them), or has them offloaded or split among processes.
    """
    base = getattr(model, "model", model)
    digest = hashlib.blake2b(digest_size=16)
    for part_name in _ENCODERS[kind]:
        part = getattr(base, part_name)
        if part is None:
            return None
        tensors = {"": part} if isinstance(part, torch.Tensor) else part.state_dict()
        for name, tensor in sorted(tensors.items()):
            if tensor.is_meta or isinstance(tensor, DTensor) or hasattr(tensor, "ds_id"):
                return None
            digest.update(f"{part_name}.{name} {list(tensor.shape)}".encode())
            rounded = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
            digest.update(rounded.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(processor: VideoLlamaProcessor, kinds: Sequence[str], num_frames: int, sampling: str) -> dict[str, Any]:
    """How media become the encoders' inputs, of what can be different without an error."""

    def chosen(part: Any, names: Sequence[str]) -> dict[str, Any]:
        settings = json.loads(part.to_json_string())
        return {name: settings[name] for name in names if settings.get(name) is not None}

    settings: dict[str, Any] = {}
    if "frames" in kinds or "clips" in kinds:
        settings |= {"sampling": sampling, "num_frames": num_frames}
        settings["image_processor"] = chosen(processor.image_processor, _PICTURE_SETTINGS)
        settings["video_processor"] = chosen(processor.video_processor, _PICTURE_SETTINGS)
    if "sound" in kinds:
        settings["feature_extractor"] = chosen(processor.feature_extractor, _SOUND_SETTINGS)
    return settings


def _refuse_differences(directory: Path, made_with: dict[str, Any], asked: dict[str, Any], advice: str) -> None:
    """`ValueError` with everything that differs, sub-dictionaries entry by entry."""

    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{name}.{key}" if isinstance(value, dict) else name: entry
            for name, value in settings.items()
            for key, entry in (value.items() if isinstance(value, dict) else [("", value)])
        }

    old, new = flat(made_with), flat(asked)
    wrong = [f"{name} was {old.get(name)!r} and is {value!r}" for name, value in new.items() if old.get(name) != value]
    if wrong:
        raise ValueError(f"The feature cache {directory} was made differently: {'; '.join(wrong)}. {advice}")


def _key(path: str | os.PathLike, media_root: str) -> str:
    """What a medium is called in a cache: its place below the media root, or its address."""
    name = os.fspath(path)
    return name if "://" in name else os.path.relpath(os.path.realpath(name), media_root)


def _size(path: str | os.PathLike) -> int | None:
    """Of a file in bytes, by which a replaced one is known; None for what is not there, addresses for example."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _shard_path(directory: Path, shard: int, suffix: str) -> Path:
    return directory / f"shard-{shard:05d}{suffix}"


def _read_meta(directory: Path) -> dict[str, Any]:
    path = directory / META_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is no feature cache: there is no {META_NAME} in it. Make one with"
            " examples/training/cache_features.py."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a file beside `path`, and puts it in the place of `path` when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    write(temporary)
    temporary.replace(path)


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    _replace(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class FeatureCache:
    """
    The features of a cache, read from its shards when they are asked for. Data loader workers and threads may share one.

    Args:
        directory (`str` or `os.PathLike`): What [`cache_features`] wrote. If the media were moved since, set
            `"media_root"` in its `meta.json` to where they are now.

    Raises:
        FileNotFoundError: `directory` is no feature cache.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.meta = _read_meta(self.directory)
        self._files: dict[int, Any] = {}
        self._reasons: dict[int, str] = {}
        hashes, rows, num_shards = [], [], 0
        with open(self.directory / PLAN_NAME, encoding="utf-8") as plan:
            plan_length = sum(1 for _ in plan)
        for shard in range(plan_length):
            index = _shard_path(self.directory, shard, ".jsonl")
            if not index.exists():
                continue
            num_shards += 1
            frame = clip = 0
            for line in _read_lines(index):
                hashes.append(_hash(line["path"]))
                num_frames, num_clips = line.get("frames", 0), line.get("sound", 0)
                size = -1 if line["bytes"] is None else line["bytes"]
                is_readable = "error" not in line
                rows.append((shard, frame, num_frames, clip, num_clips, size, is_readable))
                self._reasons.pop(hashes[-1], None)
                if not is_readable:
                    self._reasons[hashes[-1]] = line["error"]
                frame, clip = frame + num_frames, clip + num_clips
        if num_shards < plan_length:
            logger.warning(
                f"The feature cache {self.directory} is incomplete: {num_shards} of its {plan_length} shards are there. Run"
                " the command that made it again, and it does the rest."
            )
        # Arrays, because a dictionary of millions of paths would be copied into every worker. Of a medium that was
        # encoded again the last entry counts.
        table = np.array(hashes, dtype=np.uint64)
        order = np.argsort(table, kind="stable")
        table = table[order]
        is_last: np.ndarray = np.append(table[1:] != table[:-1], True)[: len(table)]
        self._hashes = table[is_last]
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, 7)[order][is_last]

    def __len__(self) -> int:
        """The number of media with features."""
        return int(self._rows[:, 6].sum())

    @property
    def unreadable(self) -> list[str]:
        """What is wrong with each of the media that could not be read; the texts name the files."""
        return sorted(self._reasons.values())

    def __contains__(self, path: str | os.PathLike) -> bool:
        row = self._find(path)
        return row is not None and bool(row[6])

    def get(self, path: str | os.PathLike, kind: str) -> dict[str, Any]:
        """
        The features of a medium.

        Args:
            path: As in the annotations.
            kind: `"frames"`: the image Q-Former's output for each frame, `(frames, num_query_tokens, width)`; `"clips"`: the
                vectors of ImageBind's vision tower for the same frames, `(frames, projection_dim)`; `"sound"`: those of
                its audio tower for the file's own sound, `(clips, projection_dim)`, no rows if it is silent.

        Returns:
            `{"features": tensor, "timestamps": when the frames are shown, in seconds as the processor rounds them, None for
            images and sounds, "has_audio": whether the file has a sound, None in a cache without the kind "sound"}`.

        Raises:
            MediaError: the medium is not in the cache, could not be read when it was made, or was replaced since.
            ValueError: the cache is without this kind.
        """
        kinds = self.meta["kinds"]
        if kind not in kinds:
            raise ValueError(
                f"The feature cache {self.directory} holds {' and '.join(kinds)}, not {kind}. Make another one with"
                f" `--kinds {kind}`."
            )
        row = self._find(path)
        if row is None:
            raise MediaError(
                f"{os.fspath(path)} is not in the feature cache {self.directory} (of media below"
                f" {self.meta['media_root']}). Run the command that made it again with the data that names this file."
            )
        shard, first_frame, num_frames, first_clip, num_clips, size, is_readable = row.tolist()
        if not is_readable:
            reason = self._reasons[_hash(_key(path, self.meta["media_root"]))]
            raise MediaError(f"{reason} (found when the feature cache {self.directory} was made)")
        if _size(path) not in (None, size):
            raise MediaError(
                f"{os.fspath(path)} has another size than when its features were cached in {self.directory}. Run the command"
                " that made the cache again: it encodes replaced files anew."
            )
        file = self._open(shard)
        first, number = (first_clip, num_clips) if kind == "sound" else (first_frame, num_frames)
        timestamps = None
        if kind != "sound":
            seconds = file.get_slice("timestamps")[first : first + number].tolist()
            timestamps = None if seconds[0] != seconds[0] else seconds
        if number:
            # A copy: what is cut out of a mapped file would take the whole file along from worker to trainer
            features = file.get_slice(kind)[first : first + number].clone()
        else:
            features = torch.zeros(0, self.meta["widths"][kind], dtype=getattr(torch, self.meta["dtype"]))
        return {
            "features": features,
            "timestamps": timestamps,
            "has_audio": num_clips > 0 if "sound" in kinds else None,
        }

    def check_model(self, model: Model) -> None:
        """
        Compares the model's encoders with those that made the features. What the model does not hold in memory (encoders
        left out, offloaded or split among processes) is not compared.

        Raises:
            ValueError: they differ.
        """
        for kind in self.meta["kinds"]:
            fingerprint = encoder_fingerprint(model, kind)
            if fingerprint is not None and fingerprint != self.meta["encoders"][kind]:
                raise ValueError(
                    f"The {kind} of the feature cache {self.directory} were made by other encoders"
                    f" ({', '.join(_ENCODERS[kind])} of {self.meta['model']}) than this model's"
                    f" ({getattr(model.config, '_name_or_path', '') or 'without a name'}). Make a cache with this model."
                )

    def check_processor(self, processor: VideoLlamaProcessor, num_frames: int, sampling: str) -> None:
        """
        Compares what training would show the encoders with what they were shown.

        Raises:
            ValueError: the sampling of frames or the processor's settings differ.
        """
        _refuse_differences(
            self.directory,
            self.meta["settings"],
            _settings(processor, self.meta["kinds"], num_frames, sampling),
            "Train with the same settings, or make another cache.",
        )

    def _open(self, shard: int) -> Any:
        if shard not in self._files:
            path = _shard_path(self.directory, shard, ".safetensors")
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged ({error}). Delete it and {path.with_suffix('.jsonl').name}, and run the command that"
                    " made the cache again."
                ) from error
        return self._files[shard]

    def _find(self, path: str | os.PathLike) -> np.ndarray | None:
        wanted = np.uint64(_hash(_key(path, self.meta["media_root"])))
        place = int(np.searchsorted(self._hashes, wanted))
        return self._rows[place] if place < len(self._hashes) and self._hashes[place] == wanted else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # each process opens the shards itself


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class _Media(Dataset):
    """
    Opens and decodes media in the workers. An item is a dictionary of its line of the index (without row numbers), of
    "pictures" (T, 3, H, W) and their "timestamps", and of "sound" (S, mel bins, length), as far as they are there.
    """

    def __init__(
        self, media: list[tuple[str, str]], processor: VideoLlamaProcessor, meta: dict[str, Any], with_pictures: bool
    ):
        self.media, self.processor, self.meta, self.with_pictures = media, processor, meta, with_pictures

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, position: int) -> dict[str, Any]:
        key, medium_type = self.media[position]
        path = key if "://" in key else os.path.normpath(os.path.join(self.meta["media_root"], key))
        item: dict[str, Any] = {"line": {"path": key, "bytes": _size(path)}}
        try:
            if medium_type == "image":
                if self.with_pictures:
                    item["pictures"] = self.processor.image_processor(_image(path), return_tensors="pt")[
                        "pixel_values"
                    ]
                    item["timestamps"] = None
                return item
            with open_media(path) as media:
                if self.with_pictures:
                    generator = torch.Generator().manual_seed(_hash(f"{self.meta['seed']} {key}") >> 1)
                    video = self.processor.video_processor(
                        [media],
                        num_frames=self.meta["settings"]["num_frames"],
                        sampling=self.meta["settings"]["sampling"],
                        generator=generator,
                        return_metadata=True,
                        return_tensors="pt",
                    )
                    item["pictures"] = video["pixel_values_videos"][0]
                    item["timestamps"] = _timestamps(video["video_metadata"][0])
                if "sound" in self.meta["kinds"] and has_audio(media):
                    item["sound"] = self._hear(media, path)
        except (MediaError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            reason = str(error) if isinstance(error, MediaError) else f"{path} cannot be read as an image: {error}"
            return {"line": {**item["line"], "error": reason}}
        return item

    def _hear(self, media: Any, path: str) -> torch.Tensor:
        try:
            return self.processor.feature_extractor(media, return_tensors="pt")["input_features"][0]
        except MediaError:
            raise
        except ValueError as error:  # too short a sound
            raise MediaError(f"{path}: {error}") from error


class _Batches:
    """Cuts the frames or clips of many media into batches of one size for an encoder, and keeps what it makes of them."""

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], batch_size: int):
        self.encode, self.batch_size = encode, batch_size
        self.waiting: list[torch.Tensor] = []
        self.encoded: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= self.batch_size:
            *batches, rest = torch.cat(self.waiting).split(self.batch_size)
            if len(rest) == self.batch_size:
                batches, rest = [*batches, rest], rest[:0]
            self.encoded += [self.encode(batch) for batch in batches]
            self.waiting = [rest]

    def finish(self) -> torch.Tensor | None:
        """All features, on the CPU; None without any. The GPU is waited for here and nowhere before."""
        if any(map(len, self.waiting)):
            self.encoded.append(self.encode(torch.cat(self.waiting)))
        return torch.cat(self.encoded).cpu() if self.encoded else None


@torch.no_grad()
def cache_features(
    model: Model,
    processor: VideoLlamaProcessor,
    media: Iterable[tuple[str, str]],
    directory: str | os.PathLike,
    kinds: Sequence[str] = ("frames",),
    num_frames: int = 8,
    sampling: str = "uniform",
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 4,
    media_per_shard: int = 512,
) -> FeatureCache:
    """
    Writes the features of media to a cache, or completes it: what complete shards hold is not computed again, unless a file
    has another size than it had. Started by `torchrun` or `accelerate launch`, every process takes its share of shards.

    Args:
        model (`VideoLlamaForConditionalGeneration` or `VideoLlamaModel`): On its device. The features have its dtype.
        processor (`VideoLlamaProcessor`): Its processor.
        media (`Iterable[tuple[str, str]]`): Paths or addresses, each with `"video"` or `"image"`.
        directory (`str` or `os.PathLike`): Where to, made if need be.
        kinds (`Sequence[str]`, defaults to `("frames",)`): See [`FeatureCache.get`]. `"clips"` needs ImageBind's vision tower
            (`model.load_audio_vision_tower()`).
        num_frames (`int`, defaults to 8): Frames of a video.
        sampling (`str`, defaults to `"uniform"`): Which ones: `"uniform"`, or `"headtail"` for one fixed random draw.
        seed (`int`, defaults to 0): Of that draw, together with the medium's name.
        batch_size (`int`, defaults to 64): Frames or clips that are encoded at once.
        num_workers (`int`, defaults to 4): Processes that decode ahead, for each process that encodes.
        media_per_shard (`int`, defaults to 512): What an interrupted run loses at most.

    Returns:
        `FeatureCache`: the cache.

    Raises:
        ValueError: the folder holds a cache that was made differently, or the model is without an encoder that is needed.
    """
    state = PartialState(timeout=PROCESS_TIMEOUT)
    directory = Path(directory)
    with state.main_process_first():
        if state.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            _plan(model, processor, media, directory, kinds, num_frames, sampling, seed, media_per_shard)
    meta, plan = _read_meta(directory), _read_lines(directory / PLAN_NAME)
    todo = [line for line in plan if not _shard_path(directory, line["shard"], ".jsonl").exists()]
    state.wait_for_everyone()  # before any of them is done, so that all see the same ones
    todo = todo[state.process_index :: state.num_processes]

    base = getattr(model, "model", model)
    dataset = _Media(
        [(key, medium_type) for line in todo for key, medium_type in line["media"]],
        processor,
        meta,
        with_pictures="frames" in kinds or "clips" in kinds,
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=base.device.type == "cuda")
    progress = tqdm(total=len(dataset), unit="media", desc="caching features", disable=not state.is_main_process)
    with progress:
        items = iter(loader) if todo else iter(())
        for line in todo:
            _write_shard(base, directory, meta, line, items, batch_size, progress)
    state.wait_for_everyone()
    cache = FeatureCache(directory)
    if state.is_main_process:
        text = "".join(f"{reason}\n" for reason in cache.unreadable)
        _replace(directory / UNREADABLE_NAME, lambda path: path.write_text(text, "utf-8", "backslashreplace"))
    return cache


def _plan(
    model: Model,
    processor: VideoLlamaProcessor,
    media: Iterable[tuple[str, str]],
    directory: Path,
    kinds: Sequence[str],
    num_frames: int,
    sampling: str,
    seed: int,
    media_per_shard: int,
) -> None:
    """Checks or writes `meta.json`, and appends the media that are new to the plan."""
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong or not kinds:
        raise ValueError(f"The kinds of features are {', '.join(KINDS)}; got {', '.join(wrong) or 'none'}.")
    for leftover in directory.glob(f"*{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    media = list(dict.fromkeys((os.fspath(path), medium_type) for path, medium_type in media))
    if not media:
        raise ValueError("There are no media to cache: the data names none.")
    encoders = {kind: encoder_fingerprint(model, kind) for kind in kinds}
    for kind, fingerprint in encoders.items():
        if fingerprint is None:
            raise ValueError(
                f"The features of kind {kind} need the model's {', '.join(_ENCODERS[kind])} in memory, which this model has"
                f" not.{' Load it with `model.load_audio_vision_tower()`.' if kind == 'clips' else ''}"
            )
    asked = {
        "kinds": list(kinds),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "encoders": encoders,
        "settings": _settings(processor, kinds, num_frames, sampling),
    }
    plan: list[dict[str, Any]] = []
    if (directory / META_NAME).exists():
        meta = _read_meta(directory)
        advice = "Use the same settings to complete it, or another folder."
        settings = asked.pop("settings")
        _refuse_differences(directory, meta, asked, advice)
        _refuse_differences(directory, meta["settings"], settings, advice)
        plan = _read_lines(directory / PLAN_NAME)
    else:
        config = getattr(model, "model", model).config
        folders = {os.path.dirname(os.path.realpath(path)) for path, _ in media if "://" not in path}
        meta = {
            "model": config._name_or_path or None,
            "media_root": os.path.commonpath(folders) if folders else os.getcwd(),
            "widths": {"sound": config.audio_config.projection_dim} if "sound" in kinds else {},
            **asked,
        }
        _write_lines(directory / PLAN_NAME, [])
        text = json.dumps(meta, indent=2) + "\n"
        _replace(directory / META_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    known: dict[str, Any] = {}  # every planned medium, and the size it had if it is done
    for line in plan:
        index = _shard_path(directory, line["shard"], ".jsonl")
        known.update((key, "planned") for key, _ in line["media"])
        if index.exists():
            known.update((entry["path"], entry["bytes"]) for entry in _read_lines(index))
    new = []
    for path, medium_type in media:
        key = _key(path, meta["media_root"])
        # What is gone keeps its features; what has another size than it had was replaced
        if key not in known or (known[key] != "planned" and _size(path) not in (None, known[key])):
            known[key] = "planned"
            new.append((key, medium_type))
    shards = [new[start : start + media_per_shard] for start in range(0, len(new), media_per_shard)]
    if shards:
        plan += [{"shard": len(plan) + number, "media": shard} for number, shard in enumerate(shards)]
        _write_lines(directory / PLAN_NAME, plan)


def _write_shard(
    model: VideoLlamaModel,
    directory: Path,
    meta: dict[str, Any],
    plan: dict[str, Any],
    items: Iterator[dict[str, Any]],
    batch_size: int,
    progress: tqdm,
) -> None:
    """Encodes the next `items`, the media of one shard, and writes them."""
    encoders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "frames": lambda rows: model.get_frame_features(rows).last_hidden_state,
        "clips": lambda rows: model.get_clip_features(pixel_values_videos=rows[None]).last_hidden_state[0],
        "sound": lambda rows: model.get_clip_features(input_features=rows[None]).last_hidden_state[0],
    }
    batches = {kind: _Batches(encoders[kind], batch_size) for kind in meta["kinds"]}
    lines: list[dict[str, Any]] = []
    seconds: list[float] = []
    for _ in plan["media"]:
        item = next(items)
        line = item["line"]
        if "error" in line:
            logger.warning(line["error"])
        if "pictures" in item:
            line["frames"] = len(item["pictures"])
            seconds += item["timestamps"] or [float("nan")] * line["frames"]
            pictures = item["pictures"].to(model.device, non_blocking=True)
            for kind in ("frames", "clips"):
                if kind in batches:
                    batches[kind].add(pictures)
        if "sound" in item:
            line["sound"] = len(item["sound"])
            batches["sound"].add(item["sound"].to(model.device, non_blocking=True))
        lines.append(line)
        progress.update()
    tensors = {kind: features for kind, batch in batches.items() if (features := batch.finish()) is not None}
    tensors["timestamps"] = torch.tensor(seconds, dtype=torch.float64)
    path = _shard_path(directory, plan["shard"], ".safetensors")
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    _write_lines(_shard_path(directory, plan["shard"], ".jsonl"), lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class CacheArguments:
    """What the command can be told. Fields that training has as well are read from a stage's YAML file, too."""

    model: str = field(default="", metadata={"help": "Folder or Hub id of the model."})
    feature_cache: str = field(default="", metadata={"help": "Folder of the cache; an unfinished one is completed."})
    datasets: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "The data sets whose media are encoded, as for training."}
    )
    media: list[str] = field(
        default_factory=list, metadata={"help": "Videos and images, or folders of them, to encode as well."}
    )
    branch: str = field(
        default="video", metadata={"help": "The branch that will train.", "choices": ["video", "audio"]}
    )
    kinds: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Which features: `frames` for the video branch, `clips` (ImageBind's vectors of the frames) for training "
            "the audio branch, `sound` (ImageBind's vectors of the files' own sound). By default what `branch` trains on.",
            "choices": list(KINDS),
        },
    )
    sampling: str = field(
        default="uniform",
        metadata={
            "help": "Which frames of a video: `uniform`, or `headtail` for one random draw that every epoch sees.",
            "choices": ["uniform", "headtail"],
        },
    )
    num_frames: int = field(default=8, metadata={"help": "Frames of a video."})
    seed: int = field(default=42, metadata={"help": "Of the draw of `headtail`."})
    dtype: str | None = field(
        default=None, metadata={"help": "Number format; by default `bfloat16` with `--bf16`, otherwise `float32`."}
    )
    bf16: bool = field(default=False, metadata={"help": "As in training."})
    batch_size: int = field(default=64, metadata={"help": "Frames that are encoded at once."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode ahead, for each GPU."})
    media_per_shard: int = field(
        default=512, metadata={"help": "Media in a file; what an interruption loses at most."}
    )

    def __post_init__(self) -> None:
        for name in ("model", "feature_cache"):
            if not getattr(self, name):
                raise ValueError(f"Give `--{name}`, on the command line or in the YAML file.")
        if isinstance(self.datasets, str):
            self.datasets = json.loads(self.datasets)
        if self.datasets is not None:
            self.datasets = check_datasets(self.datasets)
        elif not self.media:
            raise ValueError("Give `--datasets` (or a YAML file with them), or files and folders as `--media`.")
        self.kinds = self.kinds or (["frames"] if self.branch == "video" else ["clips"])


def find_media(
    datasets: Iterable[dict[str, Any]], files: Iterable[str | os.PathLike] = ()
) -> Iterator[tuple[str, str]]:
    """
    The media that annotations name, as training shows them, and files, or those in folders at any depth.

    Yields:
        `(path, "image" | "video")`.
    """
    for entry in datasets:
        rows = load_annotations(entry["format"], entry["annotations"], entry.get("media_root"))
        for row in tqdm(rows, desc=f"reading {entry['annotations']}", unit="row", leave=False):
            for item in (item for message in row["messages"] for item in message["content"]):
                if item["type"] != "text":
                    yield item["path"], _medium_type(item["path"]) if item["type"] == "audio" else item["type"]
    for name in map(Path, files):
        if not name.exists():
            raise FileNotFoundError(f"{name} does not exist (looked for it from {os.getcwd()}).")
        for path in sorted(name.rglob("*")) if name.is_dir() else [name]:
            kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
            if not name.is_dir() or (kind in ("image", "video", "audio") and path.is_file()):
                yield str(path), _medium_type(path)


def _medium_type(path: str | os.PathLike) -> str:
    return "image" if is_frame(path) else "video"


def parse_arguments(argv: Sequence[str]) -> CacheArguments:
    """
    Reads `[config.yaml] [--field value …]`. What else the file holds is about the training, and left to it.

    Raises:
        ValueError: for values that do not fit. `SystemExit`: from `argparse`, for unknown flags.
    """
    parser = HfArgumentParser(
        CacheArguments,
        prog="cache_features.py",
        description="Writes what the frozen encoders make of a data set's media, for training with --feature_cache.",
        allow_abbrev=False,
    )
    names = {action.dest for action in parser._actions}
    for action in parser._actions:  # only what was given on the command line may override the file
        action.default = argparse.SUPPRESS
    parser.add_argument("config", nargs="?", metavar="config.yaml", default=None, help="YAML file of a training stage")
    given = vars(parser.parse_args(list(argv)))
    config = given.pop("config")
    values = {}
    if config is not None:
        try:
            values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{config} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{config} must hold `name: value` lines, but holds {type(values).__name__}.")
        values = {name: value for name, value in values.items() if name in names}
    return parser.parse_dict({**values, **given})[0]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `examples/training/cache_features.py`; started by `torchrun` the processes share the work."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    state = PartialState(timeout=PROCESS_TIMEOUT)
    processor = VideoLlamaProcessor.from_pretrained(args.model)
    dtype = args.dtype or ("bfloat16" if args.bf16 else "float32")
    model = VideoLlamaForConditionalGeneration.from_pretrained(args.model, dtype=dtype).model
    model.language_model = None  # most of the memory, and not needed
    if "clips" in args.kinds and model.audio_vision_tower is None:
        model.load_audio_vision_tower()
    model.to(state.device)
    # Only the first process plans the work
    media = find_media(args.datasets or [], args.media) if state.is_main_process else ()
    cache = cache_features(
        model,
        processor,
        media,
        args.feature_cache,
        args.kinds,
        args.num_frames,
        args.sampling,
        args.seed,
        args.batch_size,
        args.dataloader_num_workers,
        args.media_per_shard,
    )
    if state.is_main_process:
        unreadable = len(cache.unreadable)
        print(f"{args.feature_cache}: {' and '.join(args.kinds)} of {len(cache)} media, {unreadable} unreadable.")
        if unreadable:
            print(f"What is wrong with them: {cache.directory / UNREADABLE_NAME}")
        if not len(cache):
            raise SystemExit("None of the media could be read.")
