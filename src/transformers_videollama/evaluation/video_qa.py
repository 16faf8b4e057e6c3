"""Open questions about videos: readers for MSVD-QA, MSRVTT-QA, ActivityNet-QA and TGIF-QA.

Three forms of files are known, and told apart by what is in them:

- a list of `{"video_id", "question", "answer", "id"}`, as MSVD-QA and MSRVTT-QA are published;
- questions `{"video_name", "question", "question_id"}` and, in a file of their own, answers
  `{"answer", "question_id", "type"}`, as ActivityNet-QA and Video-ChatGPT publish them;
- a table separated by tabs with the columns gif_name, question and answer, as TGIF-QA is published.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from .annotation_files import Row, check_items, read_rows, read_table, required
from .items import Item, Medium

ACTIVITYNET_TYPES = (
    "motion",
    "spatial relation",
    "temporal relation",
    "yes or no",
    "colour",
    "object",
    "location",
    "number",
    "other",
)
"""What the types 0 to 8 of ActivityNet-QA are."""
_QUESTION_WORDS = ("what", "who", "how", "when", "where")


def read_video_qa(
    files: Sequence[Path], video_names: Callable[[str], tuple[str, ...]], types: Sequence[str] = ()
) -> list[Item]:
    """
    The questions of a benchmark.

    Args:
        files (`Sequence[Path]`):
            Its files. Beside a file of questions called `…_q.json` the answers in `…_a.json` need not be named.
        video_names (`Callable[[str], tuple[str, ...]]`): What the file of a video may be called.
        types (`Sequence[str]`): What the types 0, 1, … of the questions are, if the benchmark has types.

    Returns:
        `list[Item]`, whose group is the type or the question's first word.

    Raises:
        ValueError: a file is of none of the known forms, or a multiple choice, or a question has no answer.
    """
    questions: list[tuple[str, Row]] = []
    answers: dict[str, Row] = {}
    for path in [*files, *_answers_beside(files)]:
        is_table = path.suffix.lower() in (".csv", ".tsv")
        for index, row in enumerate(read_table(path) if is_table else read_rows(path)):
            if "a1" in row:
                raise ValueError(f"{path} is a multiple choice; of TGIF-QA the open questions, FrameQA, are read.")
            if "question" in row:
                questions.append((f"{path}, entry {index}", row))
            else:
                place = f"{path}, entry {index}"
                answers[str(required(row, place, "question_id", "id"))] = {
                    "answer": required(row, place, "answer"),
                    "type": row.get("type"),
                }
    items = []
    for index, (place, row) in enumerate(questions):
        own_id = str(row.get("question_id", row.get("id", index)))
        if row.get("answer") is None:
            if own_id not in answers:
                raise ValueError(f"{place}: there is no answer to the question {own_id!r}; name the file of answers.")
            row = {**row, **answers[own_id]}
        video = str(required(row, place, "video_id", "video_name", "gif_name", "video"))
        question = str(required(row, place, "question"))
        items.append(
            Item(
                id=own_id,
                question=question,
                medium=Medium(video_names(video)),
                references=(str(row["answer"]),),
                group=_group(question, row.get("type"), types),
            )
        )
    return check_items(items, files)


def msrvtt_names(video: str) -> tuple[str, ...]:
    """7010 and video7010: `video7010`."""
    return (f"video{video}",) if video.isdigit() else (video,)


def activitynet_names(video: str) -> tuple[str, ...]:
    """`v_<name>`, as the videos are published, or the name alone."""
    name = video.removeprefix("v_")
    return (f"v_{name}", name)


def as_named(video: str) -> tuple[str, ...]:
    """The name alone."""
    return (video,)


def _answers_beside(files: Sequence[Path]) -> list[Path]:
    beside = [path.with_name(f"{path.stem[:-2]}_a{path.suffix}") for path in files if path.stem.endswith("_q")]
    return [path for path in beside if path.is_file() and path not in files]


def _group(question: str, type_: object, types: Sequence[str]) -> str:
    if str(type_).isdigit() and int(str(type_)) < len(types):
        return types[int(str(type_))]
    first = question.split(maxsplit=1)[0].lower() if question.strip() else ""
    return first if first in _QUESTION_WORDS else "other"
