"""The thread that has the model: it takes the requests that are ready and answers several of them at a time.

A batch is what arrives within a short time after its first request, or has gathered while the batch before was
answered. A request's answer is complete when its own row is, but no new request joins a batch that has begun.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import StoppingCriteriaList

from ..pipeline_video_text_to_text import join_prompts
from ..processing_video_llama import VideoLlamaProcessor
from .answers import Answer, AnswerSettings, Row, RowSampler, RowStoppingCriteria

logger = logging.getLogger(__name__)


class Job:
    """
    A request on its way, as the threads share it.

    Args:
        on_event (`Callable[[str | Answer | Exception], None]`):
            Is given, in the model's thread, each new piece of text, and at last the answer or what went wrong.

    Attributes:
        inputs (`dict[str, torch.Tensor]`): The model's inputs, a batch of one prompt on the CPU.
        settings ([`AnswerSettings`]): How the answer is wanted.
        is_started (`bool`): Whether it is in a batch.
        is_cancelled (`bool`): Set it if nobody waits for the answer any longer.
    """

    def __init__(self, on_event: Callable[[str | Answer | Exception], None]):
        self.on_event = on_event
        self.inputs: dict[str, torch.Tensor] = {}
        self.settings = AnswerSettings(max_tokens=1)
        self.is_started = False
        self.is_cancelled = False


class Batcher:
    """
    Answers jobs in batches, in a thread of its own.

    Args:
        model (`PreTrainedModel`): The model.
        processor ([`VideoLlamaProcessor`]): Decodes the answers. No other thread may use it.
        batch_size (`int`): The most jobs of a batch.
        window (`float`): Seconds for which the first job of a batch waits for others.

    Attributes:
        seconds (`float`): What the last batch took.
    """

    def __init__(self, model: PreTrainedModel, processor: VideoLlamaProcessor, batch_size: int, window: float):
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.window = window
        self.seconds = 0.0
        ends = model.generation_config.eos_token_id
        self._end_tokens = {ends} if isinstance(ends, int) else set(ends or ())
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="videollama-model", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job in line."""
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the thread after the jobs that are in line."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            jobs = self._take()
            is_open = None not in jobs
            self._answer([job for job in jobs if job is not None and not job.is_cancelled])

    def _take(self) -> list[Job | None]:
        jobs = [self._jobs.get()]
        end = time.monotonic() + self.window
        while len(jobs) < self.batch_size and jobs[-1] is not None:
            try:
                jobs.append(self._jobs.get(timeout=max(end - time.monotonic(), 0)))
            except queue.Empty:
                break
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        """Answers jobs together; should that fail before they have tokens, one by one, so that only one fails."""
        if not jobs:
            return
        for job in jobs:
            job.is_started = True
        start = time.monotonic()
        rows: list[Row] = []
        try:
            rows = self._rows(jobs)
            self._generate(jobs, rows)
        except Exception as error:
            logger.exception("a batch of %d failed", len(jobs))
            if len(jobs) > 1 and not any(row.num_tokens for row in rows):
                for job in jobs:
                    self._answer([job])
                return
            done = [job for job, row in zip(jobs, rows, strict=False) if row.is_done]
            for job in jobs:
                if job not in done:
                    job.on_event(error)
            return
        self.seconds = time.monotonic() - start
        num_tokens = sum(row.num_tokens for row in rows)
        logger.info("answered a batch of %d: %d tokens in %.2f s", len(jobs), num_tokens, self.seconds)

    def _rows(self, jobs: list[Job]) -> list[Row]:
        return [
            Row(
                job.settings,
                self.processor,
                self._end_tokens,
                on_text=job.on_event,
                on_answer=job.on_event,
                is_cancelled=lambda job=job: job.is_cancelled,  # type: ignore[misc]
            )
            for job in jobs
        ]

    def _generate(self, jobs: list[Job], rows: list[Row]) -> None:
        inputs: dict[str, Any] = join_prompts(self.processor.tokenizer, [job.inputs for job in jobs])
        for name, value in inputs.items():
            inputs[name] = value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
        with torch.inference_mode():
            self.model.generate(
                **inputs,
                max_new_tokens=max(job.settings.max_tokens for job in jobs),
                num_beams=1,
                do_sample=False,
                logits_processor=LogitsProcessorList([RowSampler(rows)]),
                stopping_criteria=StoppingCriteriaList([RowStoppingCriteria(rows)]),
            )
        for row in rows:
            row.finish("length")
