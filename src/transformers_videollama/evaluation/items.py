"""`Item`: one question of a benchmark, as the readers of all annotation files return it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Medium:
    """
    What a question is about.

    Args:
        names (`tuple[str, ...]`):
            What its file may be called, with or without folders and ending; the first name that is found counts.
        kind (`str`, defaults to `"video"`): `"video"` or `"image"`.
        start, end (`float`, *optional*): The part of a video that is meant, in seconds; the whole by default.
    """

    names: tuple[str, ...]
    kind: str = "video"
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Item:
    """
    A question and what is needed to score its answer.

    Args:
        id (`str`): Unlike that of any other question of the benchmark.
        question (`str`): What is asked.
        medium (`Medium`, *optional*): What it is about; nothing, for questions of text alone.
        references (`tuple[str, ...]`): The right answers: one, or several captions.
        candidates (`tuple[str, ...]`): The options of a multiple choice, of which one is the reference.
        group (`str`): The kind of question, of which the scores are told apart.
        instructions (`tuple[tuple[str, dict], ...]`): Names and arguments of instructions whose following is checked.
    """

    id: str
    question: str
    medium: Medium | None = None
    references: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    group: str = ""
    instructions: tuple[tuple[str, dict[str, Any]], ...] = field(default=(), hash=False)
