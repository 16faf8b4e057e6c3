"""What of a command's arguments are media, and of which kind."""

import mimetypes
import os
from typing import Any
from urllib.parse import urlsplit

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
    media = [argument for argument in arguments if is_medium(argument)]
    questions = [argument for argument in arguments if not is_medium(argument)]
    for question in questions:
        guessed = mimetypes.guess_type(question)[0] or ""
        if guessed.startswith(("video/", "audio/", "image/")) and " " not in question.strip():
            raise UsageError(f"There is no file {question}.")
    if not media:
        raise UsageError(f"Give at least one file or http(s) address; there is no file {arguments[0]!r}.")
    return media, questions


def media_entry(name: str) -> dict[str, Any]:
    """A file or address as an entry of a message: an image or a sound by its name, else a video."""
    # An address may go on after the name, as one that is signed does
    guessed = mimetypes.guess_type(urlsplit(name).path if is_address(name) else name)[0] or ""
    if name.lower().startswith("data:"):
        guessed = name[5:].partition(";")[0]
    kind = guessed.partition("/")[0]
    if guessed == "image/gif" or kind not in ("image", "audio"):
        kind = "video"
    return {"type": kind, "path": name}
