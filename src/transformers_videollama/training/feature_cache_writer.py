"""Writing a feature cache: [`cache_features`] decodes media in workers, encodes them in batches and writes their
shards.

The command `cache_features` calls it. What a cache consists of, and what reads it, is in `feature_cache`.

A shard is computed as a whole, in batches that do not depend on what was computed before, and its index is written
last. Hence an interrupted run is continued by the same command, any number of processes may share the work, and the
features are the same bits in every case.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import give_usual_permissions
from ..media import MediaError, describe_source, has_audio, is_address, open_media
from ..modeling_video_llama import VideoLlamaModel
from ..processing_video_llama import VideoLlamaProcessor, frame_timestamps, read_image
from .feature_cache import (
    ENCODERS,
    KINDS,
    META_NAME,
    PLAN_NAME,
    UNREADABLE_NAME,
    FeatureCache,
    Model,
    encoder_fingerprint,
    encoder_settings,
    file_size,
    hash_text,
    medium_name,
    read_lines,
    read_meta,
    refuse_differences,
    shard_path,
)

logger = logging.get_logger(__name__)

TEMPORARY_SUFFIX = ".tmp"
LOCK_NAME = ".lock"


def join_processes(use_cpu: bool = False) -> PartialState:
    """The processes that share the work, each on its device. They wait for the slowest one at the end, days if so."""
    return PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=timedelta(days=7))


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
        path = key if is_address(key) else os.path.normpath(os.path.join(self.meta["media_root"], key))
        item: dict[str, Any] = {"line": {"path": key, "type": medium_type, "bytes": file_size(path)}}
        try:
            if medium_type == "image":
                if self.with_pictures:
                    item["pictures"] = self.processor.image_processor(read_image(path), return_tensors="pt")[
                        "pixel_values"
                    ]
                    item["timestamps"] = None
                return item
            with open_media(path) as media:
                if self.with_pictures:
                    generator = torch.Generator().manual_seed(hash_text(f"{self.meta['seed']} {key}") >> 1)
                    video = self.processor.video_processor(
                        [media],
                        num_frames=self.meta["settings"]["num_frames"],
                        sampling=self.meta["settings"]["sampling"],
                        generator=generator,
                        return_metadata=True,
                        return_tensors="pt",
                    )
                    item["pictures"] = video["pixel_values_videos"][0]
                    item["timestamps"] = frame_timestamps(video["video_metadata"][0])
                if "sound" in self.meta["kinds"] and has_audio(media):
                    item["sound"] = self._hear(media, path)
        except MediaError as error:
            return {"line": {**item["line"], "error": str(error)}}
        return item

    def _hear(self, media: Any, path: str) -> torch.Tensor:
        try:
            return self.processor.feature_extractor(media, return_tensors="pt")["input_features"][0]
        except MediaError:
            raise
        except ValueError as error:  # too short a sound
            raise MediaError(f"{describe_source(path)}: {error}") from error


class _Batches:
    """
    Cuts the frames or clips of many media into batches of one size for an encoder, and keeps what it makes of them.
    """

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
    retry_errors: bool = False,
) -> FeatureCache:
    """
    Writes the features of media to a cache, or completes it: what complete shards hold is not computed again, unless a
    file has another size than it had. Started by `torchrun` or `accelerate launch`, every process takes its share of
    shards.

    Args:
        model (`VideoLlamaForConditionalGeneration` or `VideoLlamaModel`): On its device. The features have its dtype.
        processor (`VideoLlamaProcessor`): Its processor.
        media (`Iterable[tuple[str, str]]`): Paths or addresses, each with `"video"` or `"image"`.
        directory (`str` or `os.PathLike`): Where to, made if need be.
        kinds (`Sequence[str]`, defaults to `("frames",)`):
            See [`FeatureCache.get`]. `"clips"` needs ImageBind's vision tower (`model.load_audio_vision_tower()`).
        num_frames (`int`, defaults to 8): Frames of a video.
        sampling (`str`, defaults to `"uniform"`): Which ones: `"uniform"`, or `"headtail"` for one fixed random draw.
        seed (`int`, defaults to 0): Of that draw, together with the medium's name.
        batch_size (`int`, defaults to 64): Frames or clips that are encoded at once.
        num_workers (`int`, defaults to 4): Processes that decode ahead, for each process that encodes.
        media_per_shard (`int`, defaults to 512): What an interrupted run loses at most.
        retry_errors (`bool`, defaults to `False`): Whether to try media again that could not be read before.

    Returns:
        `FeatureCache`: the cache.

    Raises:
        ValueError: the folder holds a cache that was made differently, or is being written by another run, or the
        model is without an encoder that is needed.
    """
    state = join_processes()
    directory = Path(directory)
    lock = FileLock(directory / LOCK_NAME)
    try:
        with state.main_process_first():
            if state.is_main_process:
                directory.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire(timeout=0)
                except Timeout as error:
                    raise ValueError(
                        f"Another run is writing the feature cache {directory}. Wait for it; processes that are to "
                        "share the work are started together, by `torchrun` or `accelerate launch`."
                    ) from error
                settings = (kinds, num_frames, sampling, seed, media_per_shard, retry_errors)
                _plan(model, processor, media, directory, *settings)
        meta, plan = read_meta(directory), read_lines(directory / PLAN_NAME)
        todo = [line for line in plan if not shard_path(directory, line["shard"], ".jsonl").exists()]
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
    finally:
        lock.release()


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
    retry_errors: bool,
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
                f"The features of kind {kind} need the model's {', '.join(ENCODERS[kind])} in memory, which this "
                f"model has not.{' Load it with `model.load_audio_vision_tower()`.' if kind == 'clips' else ''}"
            )
    asked = {
        "kinds": list(kinds),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
        "encoders": encoders,
        "settings": encoder_settings(processor, kinds, num_frames, sampling),
    }
    plan: list[dict[str, Any]] = []
    if (directory / META_NAME).exists():
        meta = read_meta(directory)
        advice = "Use the same settings to complete it, or another folder."
        settings = asked.pop("settings")
        refuse_differences(directory, meta, asked, advice)
        refuse_differences(directory, meta["settings"], settings, advice)
        plan = read_lines(directory / PLAN_NAME)
    else:
        config = getattr(model, "model", model).config
        folders = {os.path.dirname(os.path.realpath(path)) for path, _ in media if not is_address(path)}
        meta = {
            "model": config._name_or_path or None,
            "media_root": os.path.commonpath(folders) if folders else os.getcwd(),
            "widths": {"sound": config.audio_config.projection_dim} if "sound" in kinds else {},
            **asked,
        }
        _write_lines(directory / PLAN_NAME, [])
        text = json.dumps(meta, indent=2) + "\n"
        _replace(directory / META_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    failed: dict[tuple[str, str], bool] = {}
    known: dict[tuple[str, str], Any] = {}  # every planned medium, and the size it had if it is done
    for line in plan:
        index = shard_path(directory, line["shard"], ".jsonl")
        known.update(((name, medium_type), "planned") for name, medium_type in line["media"])
        if index.exists():
            for entry in read_lines(index):
                key = entry["path"], entry["type"]
                known[key], failed[key] = entry["bytes"], "error" in entry
    new = []
    for path, medium_type in media:
        key = medium_name(path, meta["media_root"]), medium_type
        # What is gone keeps its features; what has another size than it had was replaced
        is_done = key in known and known[key] != "planned"
        is_outdated = is_done and (
            file_size(path) not in (None, known[key]) or (retry_errors and failed.get(key, False))
        )
        if key not in known or is_outdated:
            known[key] = "planned"
            new.append(key)
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
    path = shard_path(directory, plan["shard"], ".safetensors")
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    _write_lines(shard_path(directory, plan["shard"], ".jsonl"), lines)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a file beside `path`, and puts it in the place of `path` when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    write(temporary)
    give_usual_permissions(temporary)
    temporary.replace(path)


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    _replace(path, write)
