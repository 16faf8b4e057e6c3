"""Readers for captions: MSR-VTT's JSON, and MSVD's as text (`AllVideoDescriptions.txt`) or table."""

from collections.abc import Sequence
from pathlib import Path

from .annotation_files import read_json, read_table, read_text, required
from .msvd_names import SPLITS

Captions = dict[str, list[str]]
PROMPT = "Describe the video in one sentence."


def read_captions(files: Sequence[Path], split: str | None = None, mapping: dict[str, str] | None = None) -> Captions:
    """
    The captions of each video.

    Args:
        files (`Sequence[Path]`): The files; which form one has is seen in it.
        split (`str`, *optional*):
            `"train"`, `"val"`, `"test"` or `"all"`. By default the test split, or all where the files tell of none.
        mapping (`dict[str, str]`, *optional*): YouTube names of MSVD's numbered videos, which tell the split.

    Returns:
        `dict[str, list[str]]` by the name of the video, in the order of the files.

    Raises:
        ValueError: a file is of no known form, or has no videos of the split.
    """
    captions: Captions = {}
    splits: dict[str, str] = {}
    for numbered, youtube in (mapping or {}).items():
        number = int(numbered.removeprefix("vid"))
        splits[youtube] = next((name for name, numbers in SPLITS.items() if number in numbers), "")
    for path in files:
        if path.suffix.lower() == ".json":
            found = _read_msrvtt(path, splits)
        elif path.suffix.lower() == ".csv":
            found = _read_msvd_table(path)
        else:
            found = _read_msvd_text(path)
        for video, own in found.items():
            captions.setdefault(video, []).extend(own)
    present = {splits.get(video, "") for video in captions}
    if split is None:
        split = "test" if "test" in present else "all"
    chosen = {video: own for video, own in captions.items() if split == "all" or splits.get(video) == split}
    if not chosen:
        known = ", ".join(sorted(filter(None, present))) or "none: for MSVD name its mapping file"
        raise ValueError(f"{', '.join(map(str, files))}: no captions of the split {split!r}; there are {known}.")
    return chosen


def _read_msrvtt(path: Path, splits: dict[str, str]) -> Captions:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("sentences"), list):
        raise ValueError(f"{path}: expected {{'videos': […], 'sentences': […]}}, as MSR-VTT has it.")
    for index, video in enumerate(content.get("videos", ())):
        if "split" in video:
            place = f"{path}, video {index}"
            splits[str(required(video, place, "video_id"))] = {"validate": "val"}.get(video["split"], video["split"])
    captions: Captions = {}
    for index, sentence in enumerate(content["sentences"]):
        place = f"{path}, sentence {index}"
        video_id, caption = required(sentence, place, "video_id"), required(sentence, place, "caption")
        captions.setdefault(str(video_id), []).append(str(caption))
    return captions


def _read_msvd_text(path: Path) -> Captions:
    captions: Captions = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        video, _, caption = line.strip().partition(" ")
        if not caption or len(video.rsplit("_", 2)) != 3:
            raise ValueError(
                f"{path}:{number}: expected `<video>_<start>_<end> caption`, but found {line.strip()!r:.80}."
            )
        captions.setdefault(video, []).append(caption)
    return captions


def _read_msvd_table(path: Path) -> Captions:
    captions: Captions = {}
    for index, row in enumerate(read_table(path)):
        place = f"{path}, row {index + 1}"
        if row.get("Language", "English") == "English" and row.get("Description"):
            name = "_".join(str(required(row, place, column)) for column in ("VideoID", "Start", "End"))
            captions.setdefault(name, []).append(row["Description"])
        elif "Description" not in row:
            required(row, place, "Description")
    return captions
