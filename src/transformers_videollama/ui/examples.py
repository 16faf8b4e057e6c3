"""Clips to click on: new ones of the repository's miniature world, which are rendered when the page is started."""

import sys
from pathlib import Path

SEEDS = (3, 11, 42)


def render_examples(miniworld: Path, folder: Path) -> list[tuple[Path, str]]:
    """
    Renders clips that the small model of the repository has never seen.

    Args:
        miniworld (`Path`): The folder `examples/miniworld` of a clone; where it is not there, there are no examples.
        folder (`Path`): Where the clips are put; it is made.

    Returns:
        `list[tuple[Path, str]]`: videos, each with a question about it.
    """
    if not (miniworld / "ask.py").is_file():
        return []
    sys.path.insert(0, str(miniworld))
    from ask import new_clip

    folder.mkdir()
    examples = []
    for number, seed in enumerate(SEEDS):
        path = folder / f"example-{number + 1}.mp4"
        _, asked = new_clip(path, seed)
        examples.append((path, asked[number % len(asked)].question))
    return examples
