"""The benchmarks that there are: what their files are, how they are read, and how answers are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .annotation_files import check_items
from .caption_files import PROMPT, read_captions
from .instructions import read_instructions
from .items import Item, Medium
from .msvd_names import msvd_names, read_mapping
from .mvbench import read_mvbench, score_mvbench
from .object_probe import COCO_OBJECTS, make_probe
from .pope import read_pope, score_pope
from .qa_metrics import score_answers
from .scores import Score
from .video_qa import ACTIVITYNET_TYPES, activitynet_names, as_named, msrvtt_names, read_video_qa


@dataclass(frozen=True)
class Sources:
    """
    Where the questions come from.

    Args:
        files (`Sequence[Path]`): The annotation files.
        mapping (`Path`, *optional*): MSVD's `youtube_mapping.txt`.
        split (`str`, *optional*): Of captions; see [`read_captions`].
        objects (`Path`, *optional*): What `object-probe` may ask about, a line for each; COCO's objects by default.
        seed (`int`, defaults to 0): Of the objects that are asked about.
    """

    files: Sequence[Path]
    mapping: Path | None = None
    split: str | None = None
    objects: Path | None = None
    seed: int = 0

    def read_mapping(self) -> dict[str, str]:
        """MSVD's names by their numbers; none without a file."""
        return {} if self.mapping is None else read_mapping(self.mapping)


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark.

    Args:
        files (`str`): Its annotation files, for the help.
        kind (`str`): `"questions"`, `"choices"`, `"captions"`, `"yes or no"` or `"instructions"`.
        read (`Callable[[Sources], list[Item]]`): Reads them.
    """

    files: str
    kind: str
    read: Callable[[Sources], list[Item]]


def _read_qa(video_names: Callable[[str], tuple[str, ...]], sources: Sources, types: Sequence[str] = ()) -> list[Item]:
    return read_video_qa(sources.files, video_names, types)


def _read_msvd_qa(sources: Sources) -> list[Item]:
    return read_video_qa(sources.files, msvd_names(sources.read_mapping()))


def _read_captions(sources: Sources) -> list[Item]:
    mapping = sources.read_mapping()
    names = msvd_names(mapping)
    captions = read_captions(sources.files, sources.split, mapping)
    items = [Item(video, PROMPT, Medium(names(video)), tuple(own)) for video, own in captions.items()]
    return check_items(items, sources.files)


def _read_object_probe(sources: Sources) -> list[Item]:
    mapping = sources.read_mapping()
    texts: dict[str, list[str]] = {}
    names: dict[str, tuple[str, ...]] = {}
    if _are_questions(sources.files[0]):
        for item in read_video_qa(sources.files, partial(_any_names, mapping)):
            names[item.medium.names[0]] = item.medium.names
            said = [] if item.references[0].lower() in ("yes", "no") else [item.question, item.references[0]]
            texts.setdefault(item.medium.names[0], []).extend(said)
    else:
        texts = read_captions(sources.files, sources.split, mapping)
        names = {video: msvd_names(mapping)(video) for video in texts}
    vocabulary: Sequence[str] = COCO_OBJECTS
    if sources.objects is not None:
        lines = sources.objects.read_text(encoding="utf-8").splitlines()
        vocabulary = list(dict.fromkeys(line.strip().lower() for line in lines if line.strip()))
    rows = make_probe(texts, vocabulary, sources.seed)
    return [
        Item(
            id=f"{row['sampling']}/{row['question_id']}",
            question=row["text"],
            medium=Medium(names[row["video"]]),
            references=(row["label"],),
            group=row["sampling"],
        )
        for row in rows
    ]


def _are_questions(path: Path) -> bool:
    """Whether a file holds questions, as [`read_video_qa`] reads them, and not captions."""
    ending = path.suffix.lower()
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()
    if ending in (".csv", ".tsv"):
        return "question" in start.partition("\n")[0].lower()
    return ending == ".jsonl" or (ending == ".json" and start[:1] == "[")


def _any_names(mapping: dict[str, str], video: str) -> tuple[str, ...]:
    """What the file of a video may be called where the file of questions does not tell the benchmark."""
    named = (*msrvtt_names(video), *msvd_names(mapping)(video), *activitynet_names(video))
    return tuple(dict.fromkeys(named))


def score(kind: str, items: Sequence[Item], records: Sequence[dict[str, Any]], seed: int) -> list[Score]:
    """
    The scores of answers that need no judge.

    Args:
        kind (`str`): Of the benchmark; not `"instructions"`, whose answers come from two models.
        items (`Sequence[Item]`): The questions that were answered.
        records (`Sequence[dict]`): Their answers.
        seed (`int`): Of the intervals.
    """
    if kind == "questions":
        return score_answers(items, records, seed)
    if kind == "choices":
        return score_mvbench(items, records, seed)
    if kind == "yes or no":
        return score_pope(items, records, seed)
    from .caption_metrics import score_captions

    captions = {item.id: str(record["answer"]) for item, record in zip(items, records, strict=True)}
    return score_captions(captions, {item.id: item.references for item in items}, seed)


_CAPTION_FILES = "AllVideoDescriptions.txt or the table of captions (with --mapping youtube_mapping.txt: test split)"
BENCHMARKS: dict[str, Benchmark] = {
    "msvd-qa": Benchmark(
        "test_qa.json, with --mapping youtube_mapping.txt unless videos are called vid<number>",
        "questions",
        _read_msvd_qa,
    ),
    "msrvtt-qa": Benchmark("test_qa.json", "questions", partial(_read_qa, msrvtt_names)),
    "activitynet-qa": Benchmark(
        "test_q.json test_a.json", "questions", partial(_read_qa, activitynet_names, types=ACTIVITYNET_TYPES)
    ),
    "tgif-qa": Benchmark(
        "Test_frameqa_question.csv, or test_q.json test_a.json", "questions", partial(_read_qa, as_named)
    ),
    "mvbench": Benchmark(
        "the folder json, or some of its files", "choices", lambda sources: read_mvbench(sources.files)
    ),
    "msrvtt-caption": Benchmark("test_videodatainfo.json or videodatainfo_2016.json", "captions", _read_captions),
    "msvd-caption": Benchmark(_CAPTION_FILES, "captions", _read_captions),
    "pope": Benchmark(
        "coco_pope_random.json coco_pope_popular.json coco_pope_adversarial.json",
        "yes or no",
        lambda sources: read_pope(sources.files),
    ),
    "object-probe": Benchmark(
        "captions or questions of any of the above: asks for objects in videos as POPE does", "yes or no",
        _read_object_probe,
    ),
    "instructions": Benchmark(
        "IFEval's input_data.jsonl; text alone, after and before training",
        "instructions",
        lambda sources: read_instructions(sources.files),
    ),
}  # fmt: skip
