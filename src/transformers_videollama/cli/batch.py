"""Answers the questions of a JSON Lines file, thousands of them, and goes on where it stopped.

    videollama batch questions.jsonl answers.jsonl --batch-size 16
    accelerate launch -m transformers_videollama batch questions.jsonl answers.jsonl    # one process for each GPU

A line of the input has "question" and "video", "image" or "audio", or "messages", a chat. Media are named by paths,
relative to the input's folder unless --media-root is given, or by addresses. A line of the output is that line with
its "index", from 0, and "answer", or "error" where the item could not be used; an "index", "answer" or "error" of the
input's own is kept as "input_index" and so on. Lines come in the order in which they are done. Run again, the command
does what is missing. Exit status 1 if there are errors in what it did now.
"""

import argparse
import codecs
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..json_lines import append_lines, cut_unfinished_line, read_lines
from . import UsageError, make_parser
from .media_arguments import is_address
from .models import (
    add_generation_arguments,
    add_model_arguments,
    generate_arguments,
    load_model,
    not_negative_integer,
    positive,
    processor_arguments,
)
from .processes import join_processes

HELP = "answer the questions of a JSON Lines file"
KINDS = ("video", "image", "audio")
OWN_FIELDS = ("index", "answer", "error")
BATCHES_SORTED_TOGETHER = 32
"""So many batches are sorted by length at a time: few have much padding, and the first answers come soon."""


def main(argv: list[str]) -> int:
    parser = make_parser("batch", __doc__)
    parser.add_argument("input", type=Path, help="JSON Lines file of questions")
    parser.add_argument("output", type=Path, help="JSON Lines file of answers")
    parser.add_argument("--media-root", type=Path, help="folder of the media (default: the input's)")
    parser.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument(
        "--workers", type=not_negative_integer, default=2, help="processes that decode ahead (default: %(default)s)"
    )
    parser.add_argument("--retry-errors", action="store_true", help="try again what could not be used before")
    add_model_arguments(parser)
    add_generation_arguments(parser)
    args = parser.parse_args(argv)

    from accelerate.utils import gather_object

    state = join_processes(args)
    rows = read_rows(args.input)
    if not args.output.absolute().parent.is_dir():
        raise UsageError(f"{args.output}: there is no folder {args.output.absolute().parent}.")
    done = read_done(args.output, rows, args.retry_errors)
    state.wait_for_everyone()  # nobody writes before all have read
    if state.is_main_process:
        cut_unfinished_line(args.output)
    state.wait_for_everyone()
    missing = [index for index in range(len(rows)) if index not in done]
    own = missing[state.process_index :: state.num_processes]
    failed = answer_rows(args, rows, own, is_shown=state.is_main_process) if own else 0
    failed = sum(gather_object([failed])) if state.num_processes > 1 else failed
    failed_before = sum(done.values())
    if state.is_main_process:
        before = f", and {failed_before} before" if failed_before else ""
        print(
            f"{len(missing)} of {len(rows)} answered now, {failed} of them with an error{before}: {args.output}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """
    The lines of the input, with other names for what the output's lines have of their own.

    Raises:
        UsageError: naming the line that is not as described above.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deep
            raise UsageError(f"{path}:{number}: this is no JSON ({error}).") from error
        if not isinstance(row, dict) or not (_is_chat(row) if "messages" in row else _is_question(row)):
            raise UsageError(
                f'{path}:{number}: a line needs "question", with "video", "image" or "audio", or "messages"; it '
                f"is {line.decode(errors='replace').strip():.80}"
            )
        rows.append({f"input_{name}" if name in OWN_FIELDS else name: value for name, value in row.items()})
    if not rows:
        raise UsageError(f"{path} has no lines.")
    return rows


def _is_chat(row: dict[str, Any]) -> bool:
    return isinstance(row["messages"], list) and bool(row["messages"])


def _is_question(row: dict[str, Any]) -> bool:
    media = [row[kind] for kind in KINDS if row.get(kind) is not None]
    return isinstance(row.get("question"), str) and bool(media) and all(isinstance(name, str) for name in media)


def read_done(path: Path, rows: list[dict[str, Any]], retry_errors: bool) -> dict[int, bool]:
    """
    The indices of the lines that are in the output, and whether each has an error.

    Raises:
        UsageError: if the output is of another input, or is no output at all.
    """
    done: dict[int, bool] = {}
    for found in read_lines(path):
        index = found.pop("index", None)
        is_error = found.pop("error", None) is not None
        found.pop("answer", None)
        # As text, because what JSON calls NaN is no equal of itself
        if not isinstance(index, int) or not 0 <= index < len(rows) or json.dumps(found) != json.dumps(rows[index]):
            raise UsageError(f"{path} holds answers to other questions: give another file, or delete it.")
        if not is_error or not retry_errors:
            done[index] = is_error
    if path.exists():
        beginning, rest = b'{"index": ', path.read_bytes().rpartition(b"\n")[2]
        if not (rest.startswith(beginning) or beginning.startswith(rest)):
            raise UsageError(f"{path} is no output of this command: give another file.")
    return done


def make_messages(row: dict[str, Any], media_root: Path, system_prompt: str | None) -> list[dict[str, Any]]:
    """A line of the input as a chat."""
    if "messages" in row:
        return [_with_places(message, media_root) for message in row["messages"]]
    content: list[dict[str, Any]] = []
    for kind in KINDS:
        if row.get(kind) is not None:
            content.append({"type": kind, "path": _place(row[kind], media_root)})
    system = (
        [] if system_prompt is None else [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}]
    )
    return [*system, {"role": "user", "content": [*content, {"type": "text", "text": row["question"]}]}]


def _place(name: str, media_root: Path) -> str:
    return name if is_address(name) else str(media_root / name)


def _with_places(message: Any, media_root: Path) -> Any:
    """A message whose entries name files by whole paths."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = [
        {
            name: _place(value, media_root) if name in (*KINDS, "path", "url") and isinstance(value, str) else value
            for name, value in entry.items()
        }
        if isinstance(entry, dict)
        else entry
        for entry in message["content"]
    ]
    return {**message, "content": content}


def answer_rows(args: argparse.Namespace, rows: list[dict[str, Any]], indices: list[int], is_shown: bool) -> int:
    """Answers the lines of these indices and writes them to the output; returns how many could not be used."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm
    from transformers import set_seed

    from ..pipeline_video_text_to_text import VideoTextToTextPipeline, join_prompts

    model, processor = load_model(args)
    pipe = VideoTextToTextPipeline(model=model, processor=processor)
    media_root = args.media_root or args.input.parent
    preprocess_options, _, _ = pipe._sanitize_parameters(**processor_arguments(args))

    def prepare(index: int) -> tuple[int, dict[str, Any] | None, str]:
        from transformers.utils.chat_template_utils import Chat

        try:
            chat = Chat(make_messages(rows[index], media_root, args.system_prompt))
            inputs = pipe.preprocess(chat, **preprocess_options)
            del inputs["text"]
            return index, inputs, ""
        except Exception as error:  # whatever is wrong with one item, the run goes on
            return index, None, f"{type(error).__name__}: {error}"

    loader = DataLoader(
        _Prepared(indices, prepare),
        batch_sampler=list(batches_by_length(rows, indices, args.batch_size)),
        collate_fn=list,
        num_workers=min(args.workers, len(indices)),
    )

    def answer(batch: list[tuple[int, dict[str, Any]]]) -> dict[int, dict[str, str]]:
        """What comes of items; those that cannot be answered together are answered one by one."""
        inputs = join_prompts(processor.tokenizer, [inputs for _, inputs in batch])
        try:
            moved = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }
            with torch.inference_mode():
                output = model.generate(**moved, **generate_arguments(args))
        except RuntimeError as error:  # out of memory
            if len(batch) == 1:
                return {batch[0][0]: {"error": f"{type(error).__name__}: {error}"}}
        else:
            answers = processor.post_process_image_text_to_text(output[:, moved["input_ids"].shape[1] :])
            return {index: {"answer": answer} for (index, _), answer in zip(batch, answers, strict=True)}
        return {index: result for item in batch for index, result in answer([item]).items()}

    set_seed(args.seed)
    num_failed = 0
    with tqdm(total=len(indices), unit="question", disable=not is_shown) as bar:
        for batch in loader:
            results = {index: {"error": error} for index, inputs, error in batch if inputs is None}
            usable = [(index, inputs) for index, inputs, _ in batch if inputs is not None]
            if usable:
                results |= answer(usable)
            append_lines(args.output, [{"index": index, **rows[index], **results[index]} for index in sorted(results)])
            num_failed += sum("error" in result for result in results.values())
            bar.update(len(batch))
    return num_failed


def batches_by_length(rows: list[dict[str, Any]], indices: list[int], batch_size: int) -> Iterator[list[int]]:
    """Positions among `indices` in batches of prompts of about the same length, the longest of a heap first."""
    heap = BATCHES_SORTED_TOGETHER * batch_size
    for start in range(0, len(indices), heap):
        positions = range(start, min(start + heap, len(indices)))
        ordered = sorted(positions, key=lambda position: -len(json.dumps(rows[indices[position]])))
        for first in range(0, len(ordered), batch_size):
            yield ordered[first : first + batch_size]


class _Prepared:
    """The model inputs of the lines of some indices, made in the data loader's workers."""

    def __init__(self, indices: list[int], prepare: Any):
        self.indices = indices
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        return self.prepare(self.indices[position])
