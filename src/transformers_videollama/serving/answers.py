"""The answers of a batch, one for each row: how each is drawn, when it ends, and what text it is.

`generate` chooses the likeliest token for all rows. What differs from row to row hangs on it from outside: a logits
processor draws the tokens of those rows that want it at random, and a stopping criterion hands each row its tokens and
ends rows one by one. So requests with any settings go in one batch, and what is drawn for one of them does not depend
on the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation import StoppingCriteria

from ..conversation import AnswerStreamer
from ..processing_video_llama import VideoLlamaProcessor

_LOWEST_TEMPERATURE = 1e-4
"""Below, the likeliest token is as good as certain, and the scores would grow out of bounds."""


@dataclass(frozen=True)
class AnswerSettings:
    """
    How a request wants to be answered.

    Attributes:
        max_tokens (`int`): The most tokens of the answer.
        temperature (`float`): Above 0, tokens are drawn at random.
        top_p (`float`): Of the likeliest tokens that have this probability together.
        stop (`tuple[str, ...]`): Strings that end the answer.
        seed (`int`): Of what is drawn.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """
    A complete answer.

    Attributes:
        text (`str`): The answer.
        finish_reason (`str`): `"stop"`, or `"length"` if it was cut after the most tokens.
        num_tokens (`int`): Tokens that were generated, those that end an answer included.
    """

    text: str
    finish_reason: str
    num_tokens: int


class Row:
    """
    An answer that is being generated.

    Args:
        settings ([`AnswerSettings`]): How it is wanted.
        processor ([`VideoLlamaProcessor`]): Decodes the tokens.
        end_tokens (`set[int]`): Tokens that end every answer.
        on_text (`Callable[[str], None]`): Is given each new piece of text.
        on_answer (`Callable[[Answer], None]`): Is given the answer when it is complete.
        is_cancelled (`Callable[[], bool]`): Whether nobody waits for the answer any longer.
    """

    def __init__(
        self,
        settings: AnswerSettings,
        processor: VideoLlamaProcessor,
        end_tokens: set[int],
        on_text: Callable[[str], None],
        on_answer: Callable[[Answer], None],
        is_cancelled: Callable[[], bool],
    ):
        self.settings = settings
        self.end_tokens = end_tokens
        self.on_answer = on_answer
        self.is_cancelled = is_cancelled
        self.num_tokens = 0
        self.is_complete = False
        self._streamer = AnswerStreamer(processor, on_text, settings.stop)
        self._streamer.put(torch.empty(0))  # in place of the prompt
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if settings.temperature >= _LOWEST_TEMPERATURE:
            self._warpers.append(TemperatureLogitsWarper(settings.temperature))
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    @property
    def is_done(self) -> bool:
        return self.is_complete or self.is_cancelled()

    def draw(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor | None:
        """
        Draws the next token.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`): The row so far.
            scores (`torch.Tensor` of shape `(1, vocabulary)`): Of its next token.

        Returns:
            `torch.Tensor` of shape `(1, 1)`, or None where the likeliest is wanted.
        """
        if not self._warpers or self.is_done:
            return None
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self.settings.seed)
        chances = self._warpers(input_ids, scores).softmax(dim=-1)
        return torch.multinomial(chances, 1, generator=self._generator)

    def add(self, token: int) -> None:
        """Takes the next token. A row that is done goes on in the batch, but not in the answer."""
        if self.is_done:
            return
        self.num_tokens += 1
        self._streamer.put(torch.tensor([token]))
        if token in self.end_tokens or self._streamer.is_stopped:
            self.finish("stop")
        elif self.num_tokens == self.settings.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """Ends the answer, unless it has ended."""
        if not self.is_done:
            self._streamer.end()
            self.is_complete = True
            self.on_answer(Answer(self._streamer.text, reason, self.num_tokens))


class RowStoppingCriteria(StoppingCriteria):
    """
    Hands each row its next token and stops the rows that are done. A streamer would be told of a token only after it
    was decided whether to stop at it.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: object) -> torch.BoolTensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        return torch.tensor([row.is_done for row in self.rows], device=input_ids.device)


class RowSampler(LogitsProcessor):
    """Leaves of a row's scores only the token that was drawn, where one is."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = [row.draw(input_ids[i : i + 1], scores[i : i + 1]) for i, row in enumerate(self.rows)]
        if all(token is None for token in drawn):
            return scores
        scores = scores.clone()
        for i, token in enumerate(drawn):
            if token is not None:
                scores[i] = -torch.inf
                scores[i, token[0, 0]] = 0
        return scores
