"""The two names of MSVD's videos: numbered, `vid1301`, and of YouTube, `<id>_<start>_<end>`."""

from collections.abc import Callable
from pathlib import Path

from .annotation_files import read_text

SPLITS = {"train": range(1, 1201), "val": range(1201, 1301), "test": range(1301, 1971)}
"""Which numbers belong to which part, as in Venugopalan et al. (2015)."""


def read_mapping(path: Path) -> dict[str, str]:
    """
    Reads `youtube_mapping.txt`, whose lines are `<id>_<start>_<end> vid<number>`.

    Returns:
        `dict[str, str]`: the YouTube name of each numbered one.

    Raises:
        ValueError: naming the line that is not of this form.
    """
    mapping = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        names = line.split()
        if not names:
            continue
        numbered = [name for name in names if name.startswith("vid") and name[3:].isdigit()]
        if len(names) != 2 or not numbered:
            raise ValueError(
                f"{path}:{number}: expected `<YouTube name> vid<number>`, but found {line.strip()!r:.80}."
            )
        mapping[numbered[-1]] = names[1 - names.index(numbered[-1])]
    return mapping


def msvd_names(mapping: dict[str, str]) -> Callable[[str], tuple[str, ...]]:
    """What the file of a video may be called, whose number or either name is known."""
    numbers = {youtube: numbered for numbered, youtube in mapping.items()}

    def names(video: str) -> tuple[str, ...]:
        name = f"vid{video}" if video.isdigit() else video
        other = mapping.get(name) or numbers.get(name)
        return (name,) if other is None else (name, other)

    return names
