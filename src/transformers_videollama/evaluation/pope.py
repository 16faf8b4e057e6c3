"""POPE (arXiv 2305.10355): yes/no questions that probe for objects which are not there."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..media import IMAGE_ENDINGS
from .annotation_files import check_items, read_rows, required
from .items import Item, Medium
from .scores import Score, bootstrapped, share

SAMPLINGS = ("random", "popular", "adversarial")


def read_pope(files: Sequence[Path]) -> list[Item]:
    """
    The questions of a probe.

    Args:
        files (`Sequence[Path]`):
            JSON Lines of `{"question_id", "image", "text", "label"}`, with `"video"` in place of `"image"` for
            videos. How absent objects were sampled is read from a file's name, as in `coco_pope_random.json`.

    Raises:
        ValueError: a line is not of this form.
    """
    items = []
    for path in files:
        group = next((sampling for sampling in SAMPLINGS if sampling in path.stem), path.stem)
        for index, row in enumerate(read_rows(path)):
            place = f"{path}, entry {index}"
            name = str(required(row, place, "image", "video"))
            label = str(required(row, place, "label")).strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{place}: expected the label 'yes' or 'no', but it is {label!r}.")
            is_image = "image" in row and os.path.splitext(name)[1].lower() in (*IMAGE_ENDINGS, "")
            items.append(
                Item(
                    id=f"{path.stem}/{required(row, place, 'question_id')}",
                    question=str(required(row, place, "text")),
                    medium=Medium((name,), "image" if is_image else "video"),
                    references=(label,),
                    group=group,
                )
            )
    return check_items(items, files)


def read_yes_no(answer: str) -> tuple[str, bool]:
    """What POPE takes an answer for, "no" if its first sentence denies and else "yes"; and whether it says either."""
    words = re.findall(r"[a-z']+", answer.split(".")[0].lower())
    denies = any(word in ("no", "not") for word in words)
    return "no" if denies else "yes", denies or "yes" in words


def score_pope(items: Sequence[Item], records: Sequence[dict[str, Any]], seed: int) -> list[Score]:
    """
    Accuracy, precision, recall and F1 of "yes", and the share of it, for each sampling.

    Args:
        items (`Sequence[Item]`): The questions that were answered.
        records (`Sequence[dict]`): The `"answer"` of each.
        seed (`int`): Of the interval of F1.
    """
    read = [read_yes_no(record["answer"]) for record in records]
    says = np.array([said == "yes" for said, _ in read])
    truth = np.array([item.references[0] == "yes" for item in items])
    scores = []
    for group in dict.fromkeys(item.group for item in items):
        members = np.array([i for i, item in enumerate(items) if item.group == group])
        said, true = says[members], truth[members]

        def f1(drawn: np.ndarray, said: np.ndarray = said, true: np.ndarray = true) -> float | None:
            both, either = int((said & true)[drawn].sum()), int(said[drawn].sum() + true[drawn].sum())
            return 200 * both / either if either else None

        scores += [
            share("accuracy", (said == true).tolist(), group),
            share("precision", true[said].tolist(), group),
            share("recall", said[true].tolist(), group),
            bootstrapped("F1", f1, len(members), seed, group),
            share("yes ratio", said.tolist(), group),
            share("neither yes nor no", [not read[i][1] for i in members], group),
        ]
    return scores
