"""A POPE-style probe for videos: yes/no questions about objects, made from captions or from questions and answers.

As in POPE (arXiv 2305.10355) a video is asked about as many objects that it shows as about objects that it does not
show, and the latter are sampled in three ways: at random; the most popular of the data set; and the adversarial ones,
which are found most often together with what the video shows. What a video shows is what people named in it: an object
that nobody mentioned may be there all the same, which many captions for a video make unlikely.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .pope import SAMPLINGS

COCO_OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 kinds of objects of COCO, as in POPE."""
_OTHER_WORDS = {
    "person": ("people", "man", "men", "woman", "women", "boy", "girl", "guy", "lady", "child", "children", "kid"),
    "bicycle": ("bike",),
    "motorcycle": ("motorbike",),
    "airplane": ("plane",),
    "tv": ("television",),
    "couch": ("sofa",),
    "cell phone": ("phone",),
    "donut": ("doughnut",),
    "knife": ("knives",),
    "mouse": ("mice",),
    "cat": ("kitten",),
    "dog": ("puppy", "puppies"),
}
OBJECTS_PER_VIDEO = 3
"""So many that a video shows, and so many that it does not show, as in POPE."""


def find_objects(texts: Iterable[str], vocabulary: Sequence[str]) -> set[str]:
    """Which objects of a vocabulary are named in texts, in the singular or in the plural."""
    words = {word: name for name in vocabulary for word in (name.lower(), *_OTHER_WORDS.get(name, ()))}
    longest_first = sorted(words, key=lambda word: (-len(word), word))  # a hot dog is no dog
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})(?:e?s)?\b")
    return {words[match] for text in texts for match in pattern.findall(text.lower())}


def make_probe(texts: Mapping[str, Sequence[str]], vocabulary: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """
    The questions of the probe.

    Args:
        texts (`Mapping[str, Sequence[str]]`): What people said about each video.
        vocabulary (`Sequence[str]`): The objects that may be asked about.
        seed (`int`): Of what is drawn.

    Returns:
        `list[dict]`: rows in the form of POPE's files, `{"question_id", "video", "text", "label"}`, with `"sampling"`.

    Raises:
        ValueError: no object of the vocabulary is named in any text.
    """
    shown = {video: find_objects(own, vocabulary) for video, own in texts.items()}
    popularity = Counter(name for names in shown.values() for name in names)
    together = Counter((one, other) for names in shown.values() for one in names for other in names)
    rows: list[dict[str, Any]] = []
    for video, names in shown.items():
        rng = random.Random(f"{seed} {video}")
        absent = sorted(set(vocabulary) - names)
        number = min(OBJECTS_PER_VIDEO, len(names), len(absent))
        present = rng.sample(sorted(names), number)

        def by_popularity(name: str) -> tuple[int, str]:
            return -popularity[name], name

        def by_company(name: str, names: set[str] = names) -> tuple[int, int, str]:
            return -sum(together[name, other] for other in names), -popularity[name], name

        chosen = {
            "random": rng.sample(absent, number),
            "popular": sorted(absent, key=by_popularity)[:number],
            "adversarial": sorted(absent, key=by_company)[:number],
        }
        for sampling in SAMPLINGS:
            for name, label in zip(present + chosen[sampling], ["yes"] * number + ["no"] * number, strict=True):
                article = "an" if name[0] in "aeiou" else "a"
                question = f"Is there {article} {name} in the video?"
                row = {"question_id": len(rows), "video": video, "text": question, "label": label}
                rows.append({**row, "sampling": sampling})
    if not rows:
        raise ValueError("None of the objects to ask about is named in the annotation files.")
    return rows
