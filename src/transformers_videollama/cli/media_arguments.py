"""What of a command's arguments are media, and of which kind."""

import os
from typing import Any

from . import UsageError

_SCHEMES = ("http://", "https://", "data:")


def is_address(text: str) -> bool:
    """Whether a medium is somewhere else, or in its own name."""
    return text.lower().startswith(_SCHEMES)


def is_medium(text: str) -> bool:
    """Whether an argument is a file or an address, and not a question."""
    return os.path.exists(text) or is_address(text)


def split_media(arguments: list[str]) -> tuple[list[str], list[str]]:
    """
    The media and the questions among arguments in any order.

    Raises:
        UsageError: if there are no media, or if one looks like a file that is not there.
    """
    from ..media import medium_kind

    media = [argument for argument in arguments if is_medium(argument)]
    questions = [argument for argument in arguments if not is_medium(argument)]
    for question in questions:
        if medium_kind(question) is not None and " " not in question.strip():
            raise UsageError(f"There is no file {question}.")
    if not media:
        raise UsageError(f"Give at least one file or http(s) address; there is no file {arguments[0]!r}.")
    return media, questions


def media_entry(name: str) -> dict[str, Any]:
    """A file or address as an entry of a message: an image or a sound by its name, else a video."""
    from ..media import medium_kind

    return {"type": medium_kind(name) or "video", "path": name}
