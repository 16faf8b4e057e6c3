"""The feature cache: what the frozen encoders make of a data set's media, computed once and read in place of the
media.

The encoders are never trained, so that without augmentation every epoch computes the same features again. The command
`cache_features` has `feature_cache_writer` write them; [`FeatureCache`], here, gives them to `samples`. A cache is a
folder:

    meta.json              what it was made with: encoders (a fingerprint of them), sampling, settings
    plan.jsonl             which media belong to which shard, one shard a line
    shard-00000.safetensors    "frames" (rows, num_query_tokens, width), "clips" (rows, projection_dim), "sound" (rows,
                               projection_dim), whichever kinds were asked for, and "timestamps" (rows): the frames of
                               the shard's media one after the other
    shard-00000.jsonl          its media in that order, with their numbers of rows, or with what is wrong with the file
    unreadable.txt         the media that could not be read, and why
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..media import MediaError, is_address
from ..modeling_video_llama import VideoLlamaForConditionalGeneration, VideoLlamaModel
from ..processing_video_llama import VideoLlamaProcessor

logger = logging.get_logger(__name__)

META_NAME = "meta.json"
PLAN_NAME = "plan.jsonl"
UNREADABLE_NAME = "unreadable.txt"
KINDS = ("frames", "clips", "sound")

# The parts of `VideoLlamaModel` that make the features of each kind
ENCODERS = {
    "frames": ("vision_tower", "query_tokens", "qformer"),
    "clips": ("audio_vision_tower",),
    "sound": ("audio_tower",),
}
# What decides about their computation and does not show in the names and shapes of their weights
_ENCODER_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "post_layer_norm_eps", "patch_stride")
# What decides about the pixels of frames and images
_PICTURE_SETTINGS = (
    "size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
    "do_convert_rgb",
)  # fmt: skip
# What decides about the log-mel clips
_SOUND_SETTINGS = (
    "feature_size", "sampling_rate", "padding_value", "num_clips", "clip_duration", "num_mel_frames", "frame_length",
    "frame_shift", "preemphasis", "min_frequency", "mel_floor", "mean", "std"
)  # fmt: skip

Model = VideoLlamaForConditionalGeneration | VideoLlamaModel


# ---------------------------------------------------------------------------------------------------------------------
# The format


def shard_path(directory: Path, shard: int, suffix: str) -> Path:
    """The file of a shard, numbered from 0: its features (suffix `".safetensors"`) or its index (`".jsonl"`)."""
    return directory / f"shard-{shard:05d}{suffix}"


def medium_name(path: str | os.PathLike, media_root: str) -> str:
    """
    What a medium is called in a cache.

    Args:
        path (`str` or `os.PathLike`): A file or an address, as in the annotations.
        media_root (`str`): The cache's folder of media, without symbolic links.

    Returns:
        `str`: the place of a file relative to `media_root`; an address as it is.
    """
    name = os.fspath(path)
    return name if is_address(name) else os.path.relpath(os.path.realpath(name), media_root)


def hash_text(text: str) -> int:
    """64 bits of a hash, the same in every process; media are looked up by that of their name."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _hash_medium(name: str, is_image: bool) -> int:
    return hash_text(f"image {name}" if is_image else name)


def file_size(path: str | os.PathLike) -> int | None:
    """The size of a file in bytes, by which a replaced one is known; None for what is not there, such as addresses."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def read_meta(directory: Path) -> dict[str, Any]:
    """
    What a cache was made with.

    Raises:
        FileNotFoundError: `directory` is no feature cache.
    """
    path = directory / META_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is no feature cache: there is no {META_NAME} in it. Make one with"
            " examples/training/cache_features.py."
        )
    meta = json.loads(path.read_text(encoding="utf-8"))
    return {**meta, "media_root": os.path.realpath(meta["media_root"])}  # it may have been set by hand


def read_lines(path: Path) -> list[Any]:
    """The lines of a JSON-lines file, such as the plan or a shard's index."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# What a cache was made with


def encoder_fingerprint(model: Model, kind: str) -> str | None:
    """
    A hash of the weights, and of the settings, that make the features of a kind, the same for a model loaded in
    float32 or in bfloat16.

    Returns:
        `str`: 32 hexadecimal digits; None if the model is without these encoders (training from a cache does not need
        them), or has them offloaded or split among processes.
    """
    base = getattr(model, "model", model)
    digest = hashlib.blake2b(digest_size=16)
    for part_name in ENCODERS[kind]:
        part = getattr(base, part_name)
        if part is None:
            return None
        tensors = {"": part} if isinstance(part, torch.Tensor) else part.state_dict()
        config = getattr(part, "config", None)
        settings = [(name, getattr(config, name)) for name in _ENCODER_SETTINGS if hasattr(config, name)]
        digest.update(f"{part_name} {settings}".encode())
        for name, tensor in sorted(tensors.items()):
            if tensor.is_meta or isinstance(tensor, DTensor) or hasattr(tensor, "ds_id"):
                return None
            digest.update(f"{part_name}.{name} {list(tensor.shape)}".encode())
            rounded = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
            digest.update(rounded.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_settings(
    processor: VideoLlamaProcessor, kinds: Sequence[str], num_frames: int, sampling: str
) -> dict[str, Any]:
    """
    How media become the encoders' inputs, of what can be different without an error.

    Args:
        processor ([`VideoLlamaProcessor`]): Prepares the media.
        kinds (`Sequence[str]`): Of `KINDS`; settings that decide about none of them are left out.
        num_frames (`int`): Frames of a video.
        sampling (`str`): Which ones, `"uniform"` or `"headtail"`.

    Returns:
        `dict[str, Any]`: what JSON can hold: `"sampling"`, `"num_frames"`, and a dictionary for each part of the
        processor.
    """

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


def refuse_differences(directory: Path, made_with: dict[str, Any], asked: dict[str, Any], advice: str) -> None:
    """
    Compares what is asked for with what a cache was made with.

    Args:
        directory (`Path`): The cache, for the message.
        made_with, asked (`dict[str, Any]`):
            Settings by their names; dictionaries among them are compared entry by entry. What is not asked for may be
            anything.
        advice (`str`): What to do about differences, for the end of the message.

    Raises:
        ValueError: they differ; the message holds every difference.
    """

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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class FeatureCache:
    """
    The features of a cache, read from its shards when they are asked for. Data loader workers and threads may share
    one.

    Args:
        directory (`str` or `os.PathLike`): What [`cache_features`] wrote. If the media were moved since, set
            `"media_root"` in its `meta.json` to where they are now.

    Raises:
        FileNotFoundError: `directory` is no feature cache.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.meta = read_meta(self.directory)
        self._files: dict[int, Any] = {}
        self._reasons: dict[int, str] = {}
        hashes, rows, num_shards = [], [], 0
        with open(self.directory / PLAN_NAME, encoding="utf-8") as plan:
            plan_length = sum(1 for _ in plan)
        for shard in range(plan_length):
            index = shard_path(self.directory, shard, ".jsonl")
            if not index.exists():
                continue
            num_shards += 1
            frame = clip = 0
            for line in read_lines(index):
                hashes.append(_hash_medium(line["path"], line["type"] == "image"))
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
                f"The feature cache {self.directory} is incomplete: {num_shards} of its {plan_length} shards are "
                "there. Run the command that made it again, and it does the rest."
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
        rows = (self._find(path, is_image) for is_image in (False, True))
        return any(row is not None and bool(row[6]) for row in rows)

    def get(self, path: str | os.PathLike, kind: str, is_image: bool = False) -> dict[str, Any]:
        """
        The features of a medium.

        Args:
            path: As in the annotations.
            kind: `"frames"`: the image Q-Former's output for each frame, `(frames, num_query_tokens, width)`;
                `"clips"`: the vectors of ImageBind's vision tower for the same frames, `(frames, projection_dim)`;
                `"sound"`: those of its audio tower for the file's own sound, `(clips, projection_dim)`, no rows if it
                is silent.
            is_image (`bool`, *optional*, defaults to `False`):
                Whether it was encoded as an image and not as a video; of a GIF there may be both.

        Returns:
            `{"features": tensor, "timestamps": when the frames are shown, in seconds as the processor rounds them,
            None for images and sounds, "has_audio": whether the file has a sound, None in a cache without the kind
            "sound"}`.

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
        row = self._find(path, is_image)
        if row is None:
            medium = "an image" if is_image else "a video"
            raise MediaError(
                f"{os.fspath(path)} is not in the feature cache {self.directory} as {medium} (of media below"
                f" {self.meta['media_root']}). Run the command that made it again with the data that names this file."
            )
        shard, first_frame, num_frames, first_clip, num_clips, size, is_readable = row.tolist()
        if not is_readable:
            reason = self._reasons[_hash_medium(medium_name(path, self.meta["media_root"]), is_image)]
            raise MediaError(f"{reason} (found when the feature cache {self.directory} was made)")
        if file_size(path) not in (None, size):
            raise MediaError(
                f"{os.fspath(path)} has another size than when its features were cached in {self.directory}. Run the "
                "command that made the cache again: it encodes replaced files anew."
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
        Compares the model's encoders with those that made the features. What the model does not hold in memory
        (encoders left out, offloaded or split among processes) is not compared.

        Raises:
            ValueError: they differ.
        """
        for kind in self.meta["kinds"]:
            fingerprint = encoder_fingerprint(model, kind)
            if fingerprint is not None and fingerprint != self.meta["encoders"][kind]:
                raise ValueError(
                    f"The {kind} of the feature cache {self.directory} were made by other encoders"
                    f" ({', '.join(ENCODERS[kind])} of {self.meta['model']}) than this model's"
                    f" ({getattr(model.config, '_name_or_path', '') or 'without a name'}). Make a cache with this "
                    "model."
                )

    def check_processor(self, processor: VideoLlamaProcessor, num_frames: int, sampling: str) -> None:
        """
        Compares what training would show the encoders with what they were shown.

        Raises:
            ValueError: the sampling of frames or the processor's settings differ.
        """
        refuse_differences(
            self.directory,
            self.meta["settings"],
            encoder_settings(processor, self.meta["kinds"], num_frames, sampling),
            "Train with the same settings, or make another cache.",
        )

    def _open(self, shard: int) -> Any:
        if shard not in self._files:
            path = shard_path(self.directory, shard, ".safetensors")
            try:
                self._files[shard] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged ({error}). Delete it and {path.with_suffix('.jsonl').name}, and run the "
                    "command that made the cache again."
                ) from error
        return self._files[shard]

    def _find(self, path: str | os.PathLike, is_image: bool) -> np.ndarray | None:
        wanted = np.uint64(_hash_medium(medium_name(path, self.meta["media_root"]), is_image))
        place = int(np.searchsorted(self._hashes, wanted))
        return self._rows[place] if place < len(self._hashes) and self._hashes[place] == wanted else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # each process opens the shards itself
