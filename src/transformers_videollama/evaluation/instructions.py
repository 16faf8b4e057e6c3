"""Text-only instruction following, before and after training: IFEval's prompts (arXiv 2311.07911), and the tokens of
the decoder that the model was built on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .annotation_files import check_items, read_rows, required
from .instruction_checks import is_followed
from .items import Item
from .scores import Score, share

AFTER, BEFORE = "after training", "before training"


def read_instructions(files: Sequence[Path]) -> list[Item]:
    """
    The prompts of files in the form of IFEval's `input_data.jsonl`.

    Args:
        files (`Sequence[Path]`):
            JSON Lines of `{"key", "prompt", "instruction_id_list", "kwargs"}`. Prompts without instructions are
            answered as well, and count for the identity of tokens alone.

    Raises:
        ValueError: a line is not of this form.
    """
    items = []
    for path in files:
        for index, row in enumerate(read_rows(path)):
            place = f"{path}, entry {index}"
            names, arguments = row.get("instruction_id_list") or [], row.get("kwargs") or []
            if len(names) != len(arguments):
                raise ValueError(f"{place}: {len(names)} instructions, but arguments of {len(arguments)}.")
            items.append(
                Item(
                    id=str(row.get("key", index)),
                    question=str(required(row, place, "prompt")),
                    instructions=tuple(
                        (str(name), dict(own or {})) for name, own in zip(names, arguments, strict=True)
                    ),
                )
            )
    return check_items(items, files)


def loosened(response: str) -> list[str]:
    """A response and what IFEval's loose accuracy accepts in its place: without asterisks, first or last line."""
    lines = response.split("\n")
    cut = [response, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return cut + [text.replace("*", "") for text in cut]


def score_instructions(
    items: Sequence[Item], after: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]
) -> list[Score]:
    """
    IFEval's four accuracies before and after, in percent, and how often all tokens are the same.

    Prompts with an instruction that is not checked are left out of the accuracies of prompts, and such instructions
    out of those of instructions.

    Args:
        items (`Sequence[Item]`): The prompts.
        after, before (`Sequence[dict]`): Of each the `"answer"` and its `"tokens"`, from either model.
    """
    scores = []
    for group, records in ((AFTER, after), (BEFORE, before)):
        for name in ("strict", "loose"):
            verdicts = []
            for item, record in zip(items, records, strict=True):
                responses = loosened(record["answer"]) if name == "loose" else [record["answer"]]
                verdicts.append([_follows(*instruction, responses) for instruction in item.instructions])
            checked = [own for own in verdicts if own and None not in own]
            scores.append(share(f"prompts, {name}", [all(own) for own in checked], group))
            flat = [bool(verdict) for own in verdicts for verdict in own if verdict is not None]
            scores.append(share(f"instructions, {name}", flat, group))
    same = [one["tokens"] == other["tokens"] for one, other in zip(after, before, strict=True)]
    scores.append(share("identical tokens before and after", same))
    return scores


def _follows(name: str, arguments: dict[str, Any], responses: list[str]) -> bool | None:
    verdicts = [is_followed(name, arguments, response) for response in responses]
    return None if None in verdicts else any(verdicts)
