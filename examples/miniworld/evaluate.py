"""Measures what the trained small model sees and hears, on clips with combinations that it never saw in training.

    python examples/miniworld/evaluate.py [--questions 500]

Renders clips of the test split, has the real processor read them, and asks the model, greedily, until each family of
questions has its number: no two of one family about the same clip, yes and no equally often. The same questions are
asked again where something is missing:

- no video: the decoder alone, given the words of the question;
- first frame: the first sampled frame in the place of all; one frame: the same with a frame drawn at random;
- shuffled: the frames in random order;
- muted: the clip without its sound track.

An answer is right if it names one of the possible answers, and no other, and that is the true one. All answers are
kept in the work folder, so that an interrupted evaluation goes on. Prints a Markdown table and writes
`evaluation.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
import transformers
from decoder import CACHE, find_decoder
from language import FAMILIES, QA, SOUND_FAMILIES, YES_NO_FAMILIES, normalise, questions
from make_data import clip_name, render_clip, sample_scenes
from model_file import MODEL, load_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from world import Scene, generator, sample_scene

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor

MAX_NEW_TOKENS = 20
FRAMES_MATTER = ("object", "colour", "count", "motion", "direction", "order", "event")
CONDITIONS: dict[str, tuple[str, ...]] = {
    "whole": FAMILIES,
    "no video": FAMILIES,
    "first frame": FRAMES_MATTER,
    "one frame": FRAMES_MATTER,
    "shuffled": FRAMES_MATTER,
    "muted": SOUND_FAMILIES,
}


@dataclass(frozen=True)
class Question:
    """A question about the test clip of an index; `clip` and the family identify it."""

    clip: int
    item: QA
    num_objects: int


# Parts of families that are counted by themselves
SUBSETS: dict[str, tuple[str, Callable[[Question], bool]]] = {
    "see, absent": ("see", lambda question: question.item.canonical == "No."),
    "hear, a sound": ("hear", lambda question: question.item.canonical != "Nothing."),
    "hear_presence, absent": ("hear_presence", lambda question: question.item.canonical == "No."),
    **{
        f"{family}, {number} shown": (family, lambda question, number=number: question.num_objects == number)
        for family in ("object", "colour", "motion")
        for number in (1, 2, 3)
    },
}
TARGETS = {
    "object": 0.95,
    "colour": 0.95,
    "motion": 0.90,
    "order": 0.90,
    "count": 0.90,
    "hear": 0.70,
    "see, absent": 0.90,
    "hear_presence, absent": 0.90,
}
# What no order of the frames can hide: these need no other frame to be told from all other answers
_UNORDERED = ("It circles.", "It stays still.", "It bounces.")
_NUM_TRAINING_SCENES = 1000  # whose answers are counted for the most frequent one
TEXT_QUESTIONS = (
    "Hello!", "What is the capital of France?", "Name three fruits.", "What is 2 + 2?", "Write a haiku about rain.",
    "Who are you?", "Translate 'good morning' into Spanish.", "What colour is the sky?", "Is a whale a fish?",
    "Count from one to five.", "What do you see?", "What do you hear?", "Give me a word that rhymes with cat.",
    "Why do leaves fall?", "What is the largest planet?", "How do bees make honey?", "Say something nice.",
    "What is a drum?", "List the days of the week.", "Which way is north?", "Explain gravity in a sentence.",
    "What does a dog say?", "How many legs has a spider?", "What is Python?",
)  # fmt: skip


def choose_questions(num_questions: int, seed: int) -> list[Question]:
    """The first `num_questions` of each family, from one clip after another, half of them "No." where the answer is
    yes or no. A larger number only adds to a smaller one."""
    limits = {name: num_questions for name in FAMILIES if name not in YES_NO_FAMILIES}
    limits |= {f"{name} {answer}": num_questions // 2 for name in YES_NO_FAMILIES for answer in ("Yes.", "No.")}
    counts: Counter[str] = Counter()
    chosen = []
    index = 0
    with tqdm(total=sum(limits.values()), desc="choosing questions", unit="question") as bar:
        while any(counts[key] < limit for key, limit in limits.items()):
            scene = sample_scene(generator(seed, "test", index, "scene"), "test")
            rng = generator(seed, "test", index, "evaluation")
            possible = questions(scene, rng)
            for position in rng.permutation(len(possible)):
                item = possible[position]
                if any(other.clip == index and other.item.family == item.family for other in chosen[-len(FAMILIES) :]):
                    continue
                if item.family in SOUND_FAMILIES and not scene.audio_track:
                    continue
                key = f"{item.family} {item.canonical}" if item.family in YES_NO_FAMILIES else item.family
                if counts[key] < limits[key]:
                    counts[key] += 1
                    bar.update()
                    chosen.append(Question(index, item, len(scene.objects)))
            index += 1
    return chosen


def named_option(answer: str, item: QA) -> str | None:
    """Which of the possible answers a text names, if it names just one."""
    said = normalise(answer)
    if said == normalise(item.answer):
        return item.canonical

    def names(option: str) -> bool:
        return f" {normalise(option).removeprefix('it ')} " in f" {said} "

    named = [option for option in item.options if names(option)]
    return named[0] if len(named) == 1 else None


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share (E. B. Wilson, 1927)."""
    share = right / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max((centre - half) / (1 + z * z / total), 0.0), min((centre + half) / (1 + z * z / total), 1.0)


def unordered_bound(item: QA) -> float | None:
    """
    How often frames whose order is unknown give the answer away, at best; None where their order does not matter.
    """
    if item.family == "order":
        return 1 / len(item.options)
    if item.family in ("motion", "direction", "event"):
        return 1.0 if item.canonical in _UNORDERED else 0.5
    return None


def frequent_answers(seed: int) -> dict[str, Counter[str]]:
    """How often each answer of each family is right in the training split."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in FAMILIES}
    for index, scene in enumerate(sample_scenes("train", _NUM_TRAINING_SCENES, seed)):
        for item in questions(scene, generator(seed, "train", index, "evaluation")):
            counts[item.family][item.canonical] += 1
    return counts


def summarise(
    chosen: list[Question], answers: dict[tuple[str, Question], str], frequent: dict[str, Counter[str]]
) -> dict[str, dict[str, Any]]:
    """
    For each family and part of one: of each condition (share, low, high), what guessing gives, how many questions.
    """
    rows = {name: [question for question in chosen if question.item.family == name] for name in FAMILIES}
    for name, (family, belongs) in SUBSETS.items():
        rows[name] = [question for question in rows[family] if belongs(question)]
    result: dict[str, dict[str, Any]] = {}
    for name, members in rows.items():
        if not members:
            continue
        family = members[0].item.family
        row: dict[str, Any] = {"questions": len(members)}
        for condition, families in CONDITIONS.items():
            if family in families:
                right = sum(
                    named_option(answers[condition, question], question.item) == question.item.canonical
                    for question in members
                )
                row[condition] = (right / len(members), *wilson(right, len(members)))
        guesses = [max(q.item.options, key=lambda o: frequent[q.item.family][o]) == q.item.canonical for q in members]
        row["most frequent"] = sum(guesses) / len(members)
        row["chance"] = sum(1 / len(question.item.options) for question in members) / len(members)
        bounds = [unordered_bound(question.item) for question in members]
        row["unordered, at best"] = None if None in bounds else sum(bounds) / len(members)
        result[name] = row
    return result


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown; percentages, with the 95% interval of what the model reaches."""
    columns = [*list(CONDITIONS)[1:], "most frequent", "chance", "unordered, at best"]
    lines = [
        "| family | questions | whole clip (95%) | " + " | ".join(columns) + " |",
        "|---|--:|--:" + "|--:" * len(columns) + "|",
    ]
    for name, row in rows.items():
        share, low, high = row["whole"]
        cells = [f"{name}{' (zero-shot)' if name.split(',')[0] in SOUND_FAMILIES else ''}", str(row["questions"])]
        cells.append(f"**{share:.1%}** ({low:.1%}–{high:.1%})")
        for column in columns:
            value = row.get(column)
            value = value[0] if isinstance(value, tuple) else value
            cells.append("" if value is None else f"{value:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judge(rows: dict[str, dict[str, Any]], text_is_identical: bool) -> list[tuple[str, bool]]:
    """Which targets are reached: (what, whether)."""
    verdicts = []
    for name, target in TARGETS.items():
        share = rows[name]["whole"][0]
        verdicts.append((f"{name}: {share:.1%} of {target:.0%}", share >= target))
    for name in ("motion", "direction", "order"):
        for condition in ("shuffled", "one frame", "first frame"):
            share, low, _ = rows[name][condition]
            bound = rows[name]["unordered, at best"]
            verdicts.append((f"{name}, {condition}: {share:.1%}, at best {bound:.1%} by luck", low <= bound))
    verdicts.append(("text alone: the bare decoder's tokens", text_is_identical))
    return verdicts


class Model:
    """The small model with the features of clips, each encoded once."""

    def __init__(self, model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, folder: Path):
        self.model, self.processor, self.folder = model, processor, folder
        self.frames: dict[int, torch.Tensor] = {}  # of each clip (frames, num_query_tokens, width)
        self.sounds: dict[int, torch.Tensor] = {}  # of each clip that has any (clips, projection_dim)

    @torch.inference_mode()
    def encode(self, clip: int) -> None:
        """Reads a clip's file through the real processor, if it has not been read."""
        if clip in self.frames:
            return
        chat = [{"role": "user", "content": [{"type": "video", "path": str(self.folder / clip_name("test", clip))}]}]
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.dtype)
        core = self.model.model
        self.frames[clip] = core.get_frame_features(inputs["pixel_values_videos"][0]).last_hidden_state
        if "input_features" in inputs:
            self.sounds[clip] = core.get_clip_features(inputs["input_features"]).last_hidden_state[0]

    def prompt(self, question: str, has_video: bool, has_sound: bool) -> list[int]:
        """The token ids that the chat of a question becomes, with the placeholders of its media."""
        media = [{"type": "audio"}] * has_sound + [{"type": "video"}] * has_video
        processor = self.processor
        chat = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        text = text.replace(processor.video_token, processor.video_token * processor.num_video_tokens)
        text = text.replace(processor.audio_token, processor.audio_token * processor.num_audio_tokens)
        return processor.tokenizer(text)["input_ids"]

    def shown_frames(self, clip: int, condition: str, seed: int) -> torch.Tensor:
        """The features of the frames that are shown under a condition."""
        frames = self.frames[clip]
        rng = torch.Generator().manual_seed(seed * 1_000_003 + clip)
        if condition == "shuffled":
            return frames[torch.randperm(len(frames), generator=rng)]
        if condition in ("first frame", "one frame"):
            picked = 0 if condition == "first frame" else int(torch.randint(len(frames), (1,), generator=rng))
            return frames[picked : picked + 1].expand_as(frames)
        return frames

    @torch.inference_mode()
    def ask(self, prompts: list[list[int]], **features: torch.Tensor) -> list[str]:
        """The answers to prompts of any lengths, padded on the left."""
        longest = max(map(len, prompts))
        padding = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        outputs = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **features
        )
        return self.processor.post_process_image_text_to_text(outputs[:, longest:])


def answer_all(
    model: Model, jobs: list[tuple[str, Question]], batch_size: int, seed: int
) -> Iterator[tuple[str, Question, str]]:
    """Answers questions under their conditions, (condition, question); what has the same prompt and media once."""
    groups: dict[tuple[bool, bool], list[tuple[list[int], str, Question]]] = {}
    alone: dict[str, list[Question]] = {}
    for condition, question in tqdm(jobs, desc="reading clips", unit="question"):
        if condition == "no video":
            alone.setdefault(question.item.question, []).append(question)
            continue
        model.encode(question.clip)
        has_sound = condition != "muted" and question.clip in model.sounds
        prompt = model.prompt(question.item.question, True, has_sound)
        groups.setdefault((question.item.short, has_sound), []).append((prompt, condition, question))
    with tqdm(total=len(jobs), desc="asking", unit="question") as bar:
        for (_, has_sound), members in groups.items():
            members.sort(key=lambda member: len(member[0]))
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                shown = [model.shown_frames(question.clip, condition, seed) for _, condition, question in batch]
                features = {"video_frame_features": torch.stack(shown)}
                if has_sound:
                    features["audio_clip_features"] = torch.stack([model.sounds[q.clip] for _, _, q in batch])
                said = model.ask([prompt for prompt, _, _ in batch], **features)
                for (_, condition, question), answer in zip(batch, said, strict=True):
                    yield condition, question, answer
                bar.update(len(batch))
        texts = sorted(alone, key=len)
        for start in range(0, len(texts), batch_size):
            batch_of_texts = texts[start : start + batch_size]
            said = model.ask([model.prompt(text, False, False) for text in batch_of_texts])
            for text, answer in zip(batch_of_texts, said, strict=True):
                for question in alone[text]:
                    yield "no video", question, answer
                bar.update(len(alone[text]))


def text_is_identical(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, decoder: Path
) -> bool:
    """
    Whether chats without media get the bare decoder's answers: the same prompts, tokens and scores, to the last bit.
    """
    bare = AutoModelForCausalLM.from_pretrained(decoder, dtype=model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for text in tqdm(TEXT_QUESTIONS, desc="text alone", unit="question"):
        chat = [{"role": "user", "content": text}]
        ours, theirs = (
            template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
            for template in (processor.apply_chat_template, tokenizer.apply_chat_template)
        )
        got, expected = model.generate(**ours, **options), bare.generate(**theirs, **options)
        same_logits = all(map(torch.equal, got.logits, expected.logits))
        if not torch.equal(got.sequences, expected.sequences) or not same_logits:
            return False
    return True


def read_answers(path: Path, chosen: list[Question]) -> dict[tuple[str, Question], str]:
    """The answers of an interrupted run; a line that it did not finish is removed."""
    if not path.exists():
        return {}
    lines, _, unfinished = path.read_bytes().rpartition(b"\n")
    if unfinished:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - len(unfinished))
    known = {(question.clip, question.item.question): question for question in chosen}
    answers = {}
    for line in lines.decode().splitlines():
        row = json.loads(line)
        question = known.get((row["clip"], row["question"]))
        if question is not None:
            answers[row["condition"], question] = row["answer"]
    return answers


def render(folder: Path, chosen: list[Question], seed: int, processes: int) -> None:
    """Writes the clips that are asked about."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    clips: list[tuple[int, Scene]] = [
        (index, sample_scene(generator(seed, "test", index, "scene"), "test"))
        for index in sorted({question.clip for question in chosen})
        if not (folder / clip_name("test", index)).exists()
    ]
    with Pool(processes) as pool:
        done = pool.imap_unordered(partial(render_clip, folder, "test", seed), clips, chunksize=8)
        for _ in tqdm(done, total=len(clips), desc="rendering", unit="clip"):
            pass


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500, help="of each family")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder that `train.py` wrote")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the decoder")
    parser.add_argument("--work", type=Path, default=CACHE / "evaluation", help="where clips and answers are kept")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"))
    parser.add_argument("--seed", type=int, default=1, help="of the test clips")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that render, and threads")
    options = parser.parse_args(argv)
    if options.questions < 2:
        parser.error("--questions has to be at least 2")
    disable_progress_bar()
    torch.set_num_threads(options.processes)

    chosen = choose_questions(options.questions, options.seed)
    folder = options.work / f"seed-{options.seed}"
    render(folder, chosen, options.seed, options.processes)
    model, processor = load_model(options.cache, options.model)
    fingerprint = hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest()[:16]
    path = folder / f"answers-{fingerprint}.jsonl"
    answers = read_answers(path, chosen)
    jobs = [
        (condition, question)
        for condition, families in CONDITIONS.items()
        for question in chosen
        if question.item.family in families and (condition, question) not in answers
    ]
    start = time.monotonic()
    with path.open("a", encoding="utf-8") as file:
        for condition, question, answer in answer_all(
            Model(model, processor, folder), jobs, options.batch_size, options.seed
        ):
            answers[condition, question] = answer
            row = {"condition": condition, "clip": question.clip, "question": question.item.question}
            file.write(json.dumps({**row, "truth": question.item.canonical, "answer": answer}) + "\n")
            file.flush()
    seconds = time.monotonic() - start
    rows = summarise(chosen, answers, frequent_answers(options.seed))
    decoder = find_decoder(options.cache, with_tokenizer=True)
    verdicts = judge(rows, text_is_identical(model, processor, decoder))

    print(f"\n{table(rows)}\n")
    print("Heard zero-shot: the audio branch was trained on frames alone, never on sound.")
    for what, reached in verdicts:
        print(f"{'PASS' if reached else 'MISS'}  {what}")
    print(f"{len(jobs)} questions in {seconds:.0f} s, {len(jobs) / seconds:.1f} a second")
    report = {
        "rows": rows,
        "verdicts": dict(verdicts),
        "questions": options.questions,
        "seed": options.seed,
        "model": fingerprint,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    temporary = options.output.with_name(f"{options.output.name}.part")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    temporary.replace(options.output)
    return rows


if __name__ == "__main__":
    main()
