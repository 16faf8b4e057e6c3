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
        has_left (`bool`): Whether the page was closed before; what comes after may be a last event that was under way.
        seen (`float`): When the last event came, in seconds since the epoch.
    """

    medium: Medium | None = None
    chat: Conversation | None = None
    listens: bool = True
    turns: list[Turn] = field(default_factory=list)
    pending: Turn | None = None
    has_left: bool = False
    seen: float = 0.0

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
        self._left: dict[str, float] = {}  # who has left of late, and when
        self._uses: Counter[Path] = Counter()
        self._lock = Lock()

    def __getitem__(self, session_hash: str) -> Visitor:
        """A visitor, who may be new."""
        with self._lock:
            visitor = self._visitors.setdefault(session_hash, Visitor(has_left=session_hash in self._left))
            visitor.seen = time.time()
            return visitor

    def give(self, visitor: Visitor, medium: Medium | None) -> None:
        """
        Gives a visitor another medium, or none, and removes the one before with the chat about it. A medium for a
        visitor who has left meanwhile is removed at once.
        """
        visitor.forget_chat()
        with self._lock:
            is_there = any(visitor is other for other in self._visitors.values())
            given = medium if is_there else None
            before, visitor.medium, visitor.chat = visitor.medium, given, None
            if given is not None:
                self._uses[given.path] += 1
            if before is not None:
                self._uses[before.path] -= 1
        for unused in (before, medium):
            if unused is not None:
                self.remove(unused.path)

    def remove(self, path: Path) -> None:
        """Removes an uploaded file that nobody uses."""
        with self._lock:
            if self._uses[path] <= 0:
                del self._uses[path]
                folder = path.resolve().parent
                if folder.parent == self.uploads:
                    shutil.rmtree(folder, ignore_errors=True)  # it may be gone by Gradio's own hand

    def remove_forgotten(self) -> None:
        """
        Removes files that were uploaded a while ago and that no visitor has opened, or one who closed the page before
        and has done nothing since.
        """
        now = time.time()
        for session_hash, visitor in list(self._visitors.items()):
            if visitor.has_left and visitor.pending is None and now - visitor.seen > PATIENCE:
                self.leave(session_hash)
        with self._lock:
            self._left = {session_hash: since for session_hash, since in self._left.items() if now - since <= PATIENCE}
            used = {path.resolve().parent for path, number in self._uses.items() if number > 0}
            for folder in self.uploads.glob("*"):
                if folder not in used and folder.is_dir() and now - folder.stat().st_mtime > PATIENCE:
                    shutil.rmtree(folder, ignore_errors=True)

    def leave(self, session_hash: str) -> None:
        """Forgets a visitor and all that was uploaded."""
        with self._lock:
            visitor = self._visitors.pop(session_hash, None)
            self._left[session_hash] = time.time()
        if visitor is not None:
            self.give(visitor, None)

    def close(self) -> None:
        """Forgets all visitors."""
        for session_hash in list(self._visitors):
            self.leave(session_hash)
