"""Batches of `videollama serve`: every answer is what it would be alone, whatever happens to the others."""

import logging
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_parts import Reference, make_readable, write_files

from transformers_videollama import VideoLlamaProcessor
from transformers_videollama.conversation import AnswerStreamer
from transformers_videollama.serving.answers import Answer, AnswerSettings
from transformers_videollama.serving.batching import Batcher, Job

pytestmark = pytest.mark.xdist_group("serve_batching")


@pytest.fixture(scope="module")
def reference(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(make_readable(tiny_folder, tmp_path_factory.mktemp("models") / "readable"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("media") / "files")


class Asked(Job):
    """A job that keeps what it is given."""

    def __init__(self, reference: Reference, content: list[dict[str, Any]], settings: AnswerSettings):
        super().__init__(self.keep)
        self.messages = [{"role": "user", "content": content}]
        self.inputs = dict(reference.inputs(self.messages))
        self.settings = settings
        self.events: list[Any] = []
        self.is_over = threading.Event()

    def keep(self, event: Any) -> None:
        self.events.append(event)
        if not isinstance(event, str):
            self.is_over.set()

    @property
    def answer(self) -> Answer:
        assert self.is_over.wait(120) and isinstance(self.events[-1], Answer), self.events
        assert "".join(self.events[:-1]) == self.events[-1].text
        return self.events[-1]


def run(reference: Reference, jobs: list[Asked], batch_size: int = 8) -> None:
    """Answers jobs that are all in line before the first is taken."""
    batcher = Batcher(reference.model, reference.processor, batch_size, window=0)
    for job in jobs:
        batcher.submit(job)
    batcher.start()
    batcher.close()


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def questions(reference: Reference, files: Path) -> list[Asked]:
    """About different media, with different settings."""
    video = {"type": "video", "path": str(files / "clip.mp4")}
    silent = {"type": "video", "path": str(files / "clip_silent.mp4")}
    sound = {"type": "audio", "path": str(files / "tone.wav")}
    return [
        Asked(reference, [video, text("What?")], AnswerSettings(20)),
        Asked(reference, [text("A longer question without anything to see, is it?")], AnswerSettings(7)),
        Asked(reference, [silent, text("Which?")], AnswerSettings(15, temperature=0.8, top_p=0.9, seed=1)),
        Asked(reference, [sound, text("Who?")], AnswerSettings(20, temperature=1.5, seed=2)),
    ]


def test_a_batch_answers_as_one_by_one(reference: Reference, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    together, alone = questions(reference, files), questions(reference, files)
    run(reference, together)
    assert [record.args[0] for record in caplog.records if record.args] == [4]
    run(reference, alone, batch_size=1)
    assert [job.answer for job in together] == [job.answer for job in alone]
    for job in together[:2]:  # which nothing is drawn for
        assert job.answer.text == reference.answer(job.messages, job.settings.max_tokens)[0]
        assert job.answer.num_tokens == job.settings.max_tokens and job.answer.finish_reason == "length"
        assert len(job.events) > 3


def test_seeds(reference: Reference) -> None:
    jobs = [Asked(reference, [text("Hm?")], AnswerSettings(20, temperature=1.0, seed=seed)) for seed in (1, 2, 1)]
    run(reference, jobs)
    answers = [job.answer.text for job in jobs]
    assert answers[0] == answers[2] != answers[1]


def test_impossible_settings_fail_alone(reference: Reference) -> None:
    jobs = [Asked(reference, [text("Hm?")], AnswerSettings(8, temperature=1.0, top_p=p)) for p in (1.5, 1.0)]
    run(reference, jobs)
    assert jobs[0].is_over.is_set() and isinstance(jobs[0].events[-1], ValueError)
    assert jobs[1].answer.num_tokens == 8


def test_almost_no_temperature_is_none(reference: Reference) -> None:
    jobs = [Asked(reference, [text("Hm?")], AnswerSettings(20, temperature=t)) for t in (0, 1e-30, 2e-4)]
    run(reference, jobs)
    assert len({job.answer.text for job in jobs}) == 1


def test_each_row_ends_at_its_own_end(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = reference.answer([{"role": "user", "content": [text("Hm?")]}], 24)
    stop = next(
        whole[i : i + 2] for i in range(6, 20) if whole[i : i + 2] not in whole[:i] and " " not in whole[i : i + 2]
    )
    asked = [
        Asked(reference, [text("Hm?")], AnswerSettings(24, stop=("absent", stop))),
        Asked(reference, [text("Hm?")], AnswerSettings(24, stop=("absent",))),
    ]
    run(reference, asked)
    assert asked[0].answer.text == whole.split(stop)[0] and asked[0].answer.finish_reason == "stop"
    assert asked[1].answer.text == whole and asked[1].answer.finish_reason == "length"

    letter = next(letter for letter in whole[3:] if letter != " ")
    end = reference.processor.tokenizer.convert_tokens_to_ids(letter)
    monkeypatch.setattr(reference.model.generation_config, "eos_token_id", end)
    asked = [Asked(reference, [text(words)], AnswerSettings(24)) for words in ("Hm?", "What else may there be?")]
    run(reference, asked)
    assert asked[0].answer.text == whole[: whole.index(letter) + 1]  # this end is a letter, which is shown
    assert asked[0].answer.finish_reason == "stop"
    assert asked[1].answer.text == reference.answer(asked[1].messages, 24)[0]


def test_who_leaves_is_not_answered_further(reference: Reference) -> None:
    leaving = Asked(reference, [text("What?")], AnswerSettings(300))
    staying = Asked(reference, [text("Which is it?")], AnswerSettings(10))
    keep = leaving.on_event

    def leave(event: Any) -> None:
        keep(event)
        leaving.is_cancelled = True

    leaving.on_event = leave
    never = Asked(reference, [text("Who?")], AnswerSettings(10))
    never.is_cancelled = True
    run(reference, [leaving, staying, never])
    assert len(leaving.events) == 1 and not never.is_started
    assert staying.answer.text == reference.answer(staying.messages, 10)[0]


def test_a_batch_ends_when_nobody_waits_for_it(reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    job = Asked(reference, [text("What?")], AnswerSettings(300))
    job.on_event = lambda event: setattr(job, "is_cancelled", True)
    run(reference, [job])
    num_tokens = next(record.args[1] for record in caplog.records if record.args)
    assert num_tokens < 5


def test_one_that_fails_fails_alone(reference: Reference, files: Path) -> None:
    jobs = questions(reference, files)
    del jobs[0].inputs["pixel_values_videos"]
    run(reference, jobs)
    assert isinstance(jobs[0].events[-1], ValueError) and "placeholder" in str(jobs[0].events[-1])
    assert jobs[1].answer.text == reference.answer(jobs[1].messages, 7)[0]
    assert jobs[3].answer.num_tokens == 20


@pytest.mark.parametrize("is_readable", [True, False])
def test_the_pieces_of_an_answer_are_the_answer(is_readable: bool, reference: Reference, tiny_folder: Path) -> None:
    """Whatever the tokens are: halves of characters, bytes that are none, stop strings in pieces, special tokens."""
    processor = reference.processor if is_readable else VideoLlamaProcessor.from_pretrained(tiny_folder)
    generator = random.Random(0)
    characters = "é€😀 a#.".encode() + b"\xff"
    tokenizer = processor.tokenizer
    byte_ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in characters]
    letter_ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "Asitn:#▁a"]
    ids = [token for token in [*byte_ids, *letter_ids, 0, 1, 2, 268] if token is not None]
    texts = ["Assistant: hm", "Ass", "é€ and 😀", "a ## b ### c", "stop", "sto p"]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers += [[generator.choice(ids) for _ in range(generator.randint(1, 12))] for _ in range(200)]
    for answer in answers:
        pieces: list[str] = []
        streamer = AnswerStreamer(processor, pieces.append, stop_strings=["stop", "a "])
        for tokens in [[], *([token] for token in answer)]:
            streamer.put(torch.tensor(tokens, dtype=torch.long))
            if streamer.is_stopped:
                break
        streamer.end()
        assert "".join(pieces) == streamer.text, answer
