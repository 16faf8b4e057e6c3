"""The folder of an evaluation: its settings, the answers so far, the report."""

import json
from pathlib import Path
from typing import Any

from ..json_lines import append_lines, cut_unfinished_line, read_lines

SETTINGS = "settings.json"


class Answers:
    """
    The answers so far, kept in a JSON Lines file.

    Args:
        path (`Path`): The file; a last line that was not finished is removed from it.
        retry_errors (`bool`, defaults to `False`): Whether questions whose medium could not be used count as missing.

    Attributes:
        records (`dict[str, dict]`): What is known of each question, by its id: `"answer"`, or `"error"`.
    """

    def __init__(self, path: Path, retry_errors: bool = False):
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        cut_unfinished_line(path)
        self.read()
        if retry_errors:
            self.records = {id_: record for id_, record in self.records.items() if "error" not in record}

    def read(self) -> None:
        """Reads what is in the file, to which other processes may have added."""
        self.records = {record["id"]: record for record in read_lines(self.path)}

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records and writes them down."""
        append_lines(self.path, records)
        self.records |= {record["id"]: record for record in records}


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """
    Writes down what an evaluation is made with, or compares it with what it was begun with.

    Args:
        folder (`Path`): Its folder, made if need be.
        settings (`dict`): What JSON can hold. What was not known before is added.

    Raises:
        ValueError: the folder is of an evaluation with other settings; the message names them.
    """
    path = folder / SETTINGS
    known: dict[str, Any] = {}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is no folder of an evaluation, and not empty: give another one.")
    different = [
        f"{name} was {json.dumps(known[name])} and is {json.dumps(value)}"
        for name, value in settings.items()
        if name in known and known[name] != value
    ]
    if different:
        raise ValueError(
            f"{folder} holds an evaluation with other settings: {'; '.join(different)}. Give another folder."
        )
    if settings.keys() <= known.keys():  # nothing is written by those who come after another process
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**known, **settings}, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
