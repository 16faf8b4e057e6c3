"""One model for all who ask: it answers one question after another in a thread of its own, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from ..conversation import Conversation


class Answerer:
    """The thread in which the model runs. Questions wait for each other in the order in which they come."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "videollama-model")

    def ask(
        self,
        chat: Conversation,
        question: str,
        media: list[dict[str, Any]],
        is_stopped: Event,
        **generate_kwargs: Any,
    ) -> Iterator[str]:
        """
        Asks a question in a chat.

        Args:
            chat ([`Conversation`]): The chat; it is not touched if it was stopped before it began.
            question (`str`): The question.
            media (`list[dict]`): New media that it is about.
            is_stopped (`Event`): Ends the answer after the next token; what there is of it stays in the chat.
            generate_kwargs: Arguments of `generate`.

        Yields:
            `str`: the answer so far, each time it has grown.

        Raises:
            MediaError: if a file cannot be used.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()

        def run() -> None:
            if not is_stopped.is_set():
                criteria = StoppingCriteriaList([_StopAtEvent(is_stopped)])
                chat.ask(question, media, on_text=pieces.put, stopping_criteria=criteria, **generate_kwargs)

        future = self._thread.submit(run)
        future.add_done_callback(lambda _: pieces.put(None))
        text = ""
        while (piece := pieces.get()) is not None:
            text += piece
            yield text
        future.result()

    def close(self) -> None:
        """Begins nothing new, and waits for the end of what is under way."""
        self._thread.shutdown(cancel_futures=True)


class _StopAtEvent(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
