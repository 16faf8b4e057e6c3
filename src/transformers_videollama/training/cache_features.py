"""`main`, the command that writes a feature cache: its arguments, the media that they name, and the model that encodes
them.

`examples/training/cache_features.py` calls it; `feature_cache_writer` does the work.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ..media import medium_kind
from ..modeling_video_llama import VideoLlamaForConditionalGeneration
from ..processing_video_llama import VideoLlamaProcessor
from ..video_processing_video_llama import is_frame
from .annotations import load_annotations
from .arguments import check_datasets, read_json, read_yaml
from .feature_cache import KINDS, UNREADABLE_NAME
from .feature_cache_writer import cache_features, join_processes


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
            "help": "Which features: `frames` for the video branch, `clips` (ImageBind's vectors of the frames) for "
            "training the audio branch, `sound` (ImageBind's vectors of the files' own sound). By default what "
            "`branch` trains on.",
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
    use_cpu: bool = field(default=False, metadata={"help": "As in training: compute on the CPU where there is a GPU."})
    batch_size: int = field(default=64, metadata={"help": "Frames that are encoded at once."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode ahead, for each GPU."})
    retry_errors: bool = field(
        default=False, metadata={"help": "Try media again that could not be read before, such as by addresses."}
    )
    media_per_shard: int = field(
        default=512, metadata={"help": "Media in a file; what an interruption loses at most."}
    )

    def __post_init__(self) -> None:
        for name in ("model", "feature_cache"):
            if not getattr(self, name):
                raise ValueError(f"Give `--{name}`, on the command line or in the YAML file.")
        if self.datasets is not None:
            self.datasets = check_datasets(read_json("datasets", self.datasets))
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
            if not name.is_dir() or (medium_kind(path) is not None and path.is_file()):
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
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)
        action.default = argparse.SUPPRESS  # only what was given on the command line may override the file
    parser.add_argument("config", nargs="?", metavar="config.yaml", default=None, help="YAML file of a training stage")
    given = vars(parser.parse_args(list(argv)))
    config = given.pop("config")
    values = read_yaml(config, actions, ignore_unknown=True) if config is not None else {}
    return parser.parse_dict({**values, **given})[0]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `examples/training/cache_features.py`; started by `torchrun` the processes share the work."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    state = join_processes(args.use_cpu)
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
        args.retry_errors,
    )
    if state.is_main_process:
        unreadable = len(cache.unreadable)
        print(f"{args.feature_cache}: {' and '.join(args.kinds)} of {len(cache)} media, {unreadable} unreadable.")
        if unreadable:
            print(f"What is wrong with them: {cache.directory / UNREADABLE_NAME}")
        if not len(cache):
            raise SystemExit("None of the media could be read.")
