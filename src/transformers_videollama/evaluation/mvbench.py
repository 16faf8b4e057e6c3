"""MVBench (arXiv 2311.17005): multiple choice about videos in 20 tasks, by generation and by likelihood."""

import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from .annotation_files import check_items, read_rows, required
from .items import Item, Medium
from .scores import Score, bootstrapped, share

TASKS: dict[str, tuple[str, bool]] = {
    "action_sequence": ("star/Charades_v1_480", True),
    "action_prediction": ("star/Charades_v1_480", True),
    "action_antonym": ("ssv2_video", False),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", False),
    "unexpected_action": ("FunQA_test/test", False),
    "object_existence": ("clevrer/video_validation", False),
    "object_interaction": ("star/Charades_v1_480", True),
    "object_shuffle": ("perception/videos", False),
    "moving_direction": ("clevrer/video_validation", False),
    "action_localization": ("sta/sta_video", True),
    "scene_transition": ("scene_qa/video", False),
    "action_count": ("perception/videos", False),
    "moving_count": ("clevrer/video_validation", False),
    "moving_attribute": ("clevrer/video_validation", False),
    "state_change": ("perception/videos", False),
    "fine_grained_pose": ("nturgbd", False),
    "character_order": ("perception/videos", False),
    "egocentric_navigation": ("vlnqa", False),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", True),
    "counterfactual_inference": ("clevrer/video_validation", False),
}
"""Of each file the folder of its videos (of its folders of frames, for episodic_reasoning), and whether its questions
are about the part between their "start" and "end"."""

SYSTEM_PROMPT = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
ANSWER_START = "Best option:("
"""What the answer begins with; the model goes on with a letter."""
FRAMES_PER_SECOND = 3
"""Of folders of frames."""
AVERAGE = "average of tasks"


def read_mvbench(paths: Sequence[Path]) -> list[Item]:
    """
    The questions of the tasks.

    Args:
        paths (`Sequence[Path]`): Files `<task>.json`, or folders with them.

    Returns:
        `list[Item]`, whose group is the task, with blanks.

    Raises:
        ValueError: an entry is not as published, or its answer is none of its candidates.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    items = []
    for path in files:
        folder, has_bounds = TASKS.get(path.stem, ("", True))
        for index, row in enumerate(read_rows(path)):
            place = f"{path}, entry {index}"
            video = str(required(row, place, "video"))
            candidates = tuple(map(str, required(row, place, "candidates")))
            answer = str(required(row, place, "answer"))
            if answer not in candidates or len(candidates) > len(ascii_uppercase):
                raise ValueError(f"{place}: the answer {answer!r} is none of the candidates {list(candidates)}.")
            bounds = [None if row.get(n) is None or not has_bounds else float(row[n]) for n in ("start", "end")]
            items.append(
                Item(
                    id=f"{path.stem}/{index}",
                    question=str(required(row, place, "question")),
                    medium=Medium((f"{folder}/{video}", video) if folder else (video,), "video", *bounds),
                    references=(answer,),
                    candidates=candidates,
                    group=path.stem.replace("_", " "),
                )
            )
    return check_items(items, paths)


def letters(item: Item) -> str:
    """The letters of a question's options: `"ABC"`."""
    return ascii_uppercase[: len(item.candidates)]


def question_text(item: Item) -> str:
    """The words of the question, with its options, as published."""
    options = "\n".join(f"({letter}) {option}" for letter, option in zip(letters(item), item.candidates, strict=True))
    return f"Question: {item.question}\nOptions:\n{options}\nOnly give the best option."


def chosen_option(answer: str, item: Item) -> str | None:
    """
    The option that a generated answer chooses: by its letter in front, else by being the only one that it repeats.
    """
    start = re.match(r"\W*([A-Za-z])(?=[).:,\]]|\s*$|\s*\n)", answer)  # and no article
    if start and start[1].upper() in letters(item):
        return item.candidates[letters(item).index(start[1].upper())]
    options = {option: option.lower().rstrip(".") for option in item.candidates}
    repeated = [o for o, text in options.items() if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer.lower())]
    # "not sure" repeats no "sure"
    repeated = [o for o in repeated if not any(o != p and options[o] in options[p] for p in repeated)]
    return repeated[0] if len(repeated) == 1 else None


def score_mvbench(items: Sequence[Item], records: Sequence[dict[str, Any]], seed: int) -> list[Score]:
    """
    The percentages of right choices in each task and on average over tasks.

    Args:
        items (`Sequence[Item]`): The questions that were answered.
        records (`Sequence[dict]`): Of each `"answer"`, generated, and `"likelihoods"` of the options.
        seed (`int`): Of the interval of the average, for which questions are drawn again within their tasks.
    """
    likeliest = [item.candidates[int(np.argmax(r["likelihoods"]))] for item, r in zip(items, records, strict=True)]
    generated = [chosen_option(record["answer"], item) for item, record in zip(items, records, strict=True)]
    groups = list(dict.fromkeys(item.group for item in items))
    task_of = np.array([groups.index(item.group) for item in items])
    members = [np.flatnonzero(task_of == task) for task in range(len(groups))]
    scores = []
    for name, chosen in (("by generation", generated), ("by likelihood", likeliest)):
        is_right = np.array([option == item.references[0] for option, item in zip(chosen, items, strict=True)])

        def average(drawn: np.ndarray, is_right: np.ndarray = is_right) -> float:
            tasks = task_of[drawn]
            return 100 * float(np.mean(np.bincount(tasks, is_right[drawn]) / np.bincount(tasks)))

        scores.append(bootstrapped(name, average, len(items), seed, AVERAGE, members))
        scores += [share(name, is_right[m].tolist(), group) for group, m in zip(groups, members, strict=True)]
    scores.append(share("no option named", [option is None for option in generated]))
    return scores
