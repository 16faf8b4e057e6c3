"""Who has the page open: each visitor's medium and chat, apart from those of all others, until the page is closed.

Gradio saves an upload in a folder that is named by the hash of the file, so that two visitors with the same file share
it: it is removed when the last one of them is done with it.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

from ..conversation import Conversation

PATIENCE = 600
"""Seconds after which a file that was uploaded, and that no visitor has opened, is removed."""


@dataclass
class Medium:
    """
    An uploaded file.

    Attributes:
        kind (`str`): `"video"` or `"image"`.
        path (`Path`): The file.
    """

    kind: str
    path: Path

    def entry(self) -> dict[str, Any]:
        """The file as an entry of a message."""
        return {"type": self.kind, "path": str(self.path)}


@dataclass
class Turn:
    """A question, the answer as far as there is one, and what ends it."""

    question: str
    answer: str = ""
    is_stopped: Event = field(default_factory=Event)


@dataclass
class Visitor:
    """
    Attributes:
        medium ([`Medium`], *optional*): What the chat is about.
        chat ([`Conversation`], *optional*): Holds the medium in the decoder's cache; made at the first question.
        listens (`bool`): Whether that chat hears the sound of the video.
        turns (`list[Turn]`): What is shown of the chat.
        pending ([`Turn`], *optional*): The one of them that is not answered yet.
    """

    medium: Medium | None = None
    chat: Conversation | None = None
    listens: bool = True
    turns: list[Turn] = field(default_factory=list)
    pending: Turn | None = None

    def forget_chat(self) -> None:
        """Ends the answer that is under way, and forgets all turns."""
        if self.pending is not None:
            self.pending.is_stopped.set()
            self.chat = None  # the model may still be at it
        elif self.chat is not None:
            self.chat.messages = [message for message in self.chat.messages if message["role"] == "system"]
        self.pending, self.turns = None, []

    def messages(self) -> list[dict[str, str]]:
        """The turns as the page shows them."""
        return [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
            if text
        ]


class Visitors:
    """
    All visitors, by the secret that Gradio's page makes up when it is opened.

    Args:
        uploads (`Path`): The folder in which Gradio saves uploads. Files elsewhere are never removed.
    """

    def __init__(self, uploads: Path):
        self.uploads = uploads.resolve()
        self._visitors: dict[str, Visitor] = {}
        self._uses: Counter[Path] = Counter()
        self._lock = Lock()

    def __getitem__(self, session_hash: str) -> Visitor:
        """A visitor, who may be new."""
        with self._lock:
            return self._visitors.setdefault(session_hash, Visitor())

    def give(self, visitor: Visitor, medium: Medium | None) -> None:
        """Gives a visitor another medium, or none, and removes the one before with the chat about it."""
        visitor.forget_chat()
        with self._lock:
            before, visitor.medium, visitor.chat = visitor.medium, medium, None
            if medium is not None:
                self._uses[medium.path] += 1
            if before is not None:
                self._uses[before.path] -= 1
        if before is not None:
            self.remove(before.path)

    def remove(self, path: Path) -> None:
        """Removes an uploaded file that nobody uses."""
        with self._lock:
            if self._uses[path] <= 0:
                del self._uses[path]
                folder = path.resolve().parent
                if folder.parent == self.uploads:
                    shutil.rmtree(folder, ignore_errors=True)  # it may be gone by Gradio's own hand

    def remove_forgotten(self) -> None:
        """Removes files that were uploaded a while ago and that no visitor has opened."""
        with self._lock:
            used = {path.resolve().parent for path, number in self._uses.items() if number > 0}
            for folder in self.uploads.glob("*"):
                if folder not in used and folder.is_dir() and time.time() - folder.stat().st_mtime > PATIENCE:
                    shutil.rmtree(folder, ignore_errors=True)

    def leave(self, session_hash: str) -> None:
        """Forgets a visitor and all that was uploaded."""
        with self._lock:
            visitor = self._visitors.pop(session_hash, None)
        if visitor is not None:
            self.give(visitor, None)

    def close(self) -> None:
        """Forgets all visitors."""
        for session_hash in list(self._visitors):
            self.leave(session_hash)
