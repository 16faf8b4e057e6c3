"""Reading annotation files: JSON, JSON Lines and CSV as lists of rows, with errors that name the file and the row."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .items import Item

Row = dict[str, Any]


def read_json(path: Path) -> Any:
    """
    What a JSON file holds.

    Raises:
        ValueError: it is no JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also what is no UTF-8
        raise ValueError(f"{path} is no JSON: {error}.") from error


def read_text(path: Path) -> str:
    """
    The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is in another encoding; the message names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


def read_rows(path: Path) -> list[Row]:
    """
    The rows of a JSON file that is a list of them, or of a JSON Lines file.

    Raises:
        ValueError: it is neither; the message names the file and the line.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = read_json(path)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}:{number}: expected a list of questions or a line of JSON for each, but this is no "
                        f"JSON: {error}."
                    ) from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: expected an object as entry {index}, but it is {row!r:.60}.")
    return rows


def read_table(path: Path) -> list[dict[str, str]]:
    """
    The rows of a table with a header, whose columns are separated by tabs or commas.

    Raises:
        ValueError: it is no text in UTF-8; the message names it.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            return list(csv.DictReader(file, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table of text: {error}.") from error


def required(row: Row, place: str, *names: str) -> Any:
    """
    The value of the first of some fields that a row has.

    Raises:
        ValueError: it has none of them; the message begins with `place`.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    found = ", ".join(map(str, row)) or "nothing"
    raise ValueError(f"{place}: expected a field {' or '.join(map(repr, names))}, but found {found}.")


def check_items(items: Iterable[Item], files: Iterable[Path]) -> list[Item]:
    """
    The items as a list.

    Raises:
        ValueError: there are none, or two have the same id.
    """
    checked = list(items)
    named = ", ".join(map(str, files))
    if not checked:
        raise ValueError(f"{named}: there is no question in it.")
    seen = set()
    for item in checked:
        if item.id in seen:
            raise ValueError(f"{named}: two questions have the id {item.id!r}.")
        seen.add(item.id)
    return checked
