"""JSON Lines files that grow while a command runs, and that it goes on with when it is run again."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def cut_unfinished_line(path: Path) -> None:
    """Removes what an interrupted run wrote of its last line. A file that is not there stays away."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """
    The complete lines of a file; none of one that is not there. Only line feeds end a line: texts may hold other ends.

    Raises:
        ValueError: naming the line that is no JSON object.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: this is no line that the command wrote ({error}).") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}:{number}: this is no line that the command wrote: {line[:80]!r}.")
        lines.append(found)
    return lines


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes lines at the end of a file in one go, so that those of several processes do not mix."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # Half a surrogate pair, which UTF-8 cannot hold, becomes its escape, which JSON reads as the same
        os.write(file, text.encode(errors="backslashreplace"))
    finally:
        os.close(file)
