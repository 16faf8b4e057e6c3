"""Station 0, before the branches start: which soft tokens the frozen decoder understands best, for all that may be
seen and heard.

The published code can start the projector in front of the decoder from MiniGPT-4's. There is none for a decoder as
small as ours, and from random soft tokens stage 2 learns what is in a clip, but not to find what is asked about among
several things. So the conversations of the training split are asked here without any frame or sound: a [`Dictionary`]
makes the soft tokens out of words for what the clip shows, and alone is trained, through the frozen decoder.
`branches.py` then leads the branches to these soft tokens, and the dictionaries are thrown away.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import DEVICE, FAST_BFLOAT16, fit
from make_data import clip_name, read_scenes, stand_in
from torch import nn
from torch.nn import functional as F
from world import COLOURS, DIRECTIONS, EVENTS, KINDS, MOMENTS, SIZES, Object, Scene

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.training.annotations import load_annotations
from transformers_videollama.training.collator import VideoLlamaDataCollator
from transformers_videollama.training.samples import SampleBuilder

MAX_OBJECTS = 3
NOTHING = "none"
BRANCHES = ("video", "audio")
LEARNING_RATE = 2e-4  # a soft token is a sum of so many parts that a larger one tears it apart
_BUCKETS = 4  # a batch's conversations are of about one length: those of one of so many parts of a larger draw
_NUMBERS = (NOTHING, "one", "two", "three")
_MOTIONS = {
    **{direction: direction for direction in DIRECTIONS},
    "circling": "circles",
    "still": "still",
    "growing": "grows",
    "shrinking": "shrinks",
}
_EVENTS = {event: "turns" if event == "changes" else event for event in EVENTS}
_ORDER = {2: ("first", "last"), 3: ("first", "second", "last")}
WORDS = {
    "video": tuple(
        dict.fromkeys((*_NUMBERS, *SIZES, *COLOURS, *KINDS, *_MOTIONS.values(), *_EVENTS.values(), *_ORDER[3]))
    ),
    "audio": (*(f"{kind} {moment}" for kind in KINDS for moment in MOMENTS), NOTHING),
}
PLACES = {"video": 1 + 5 * MAX_OBJECTS, "audio": 1}


def video_words(scene: Scene) -> list[str]:
    """What a clip shows, in words: how many objects, then five words about each."""
    words = [_NUMBERS[len(scene.objects)]]
    for index, thing in enumerate(scene.objects):
        order = _ORDER[len(scene.objects)][index] if scene.type == "order" else None
        words += [thing.size or NOTHING, thing.colour, thing.kind, _verb(thing), order or thing.new_colour or NOTHING]
    return words + [NOTHING] * (PLACES["video"] - len(words))


def _verb(thing: Object) -> str:
    return _MOTIONS[thing.motion] if thing.motion else _EVENTS[thing.event]


def audio_words(kind: str | None, moment: str) -> list[str]:
    """What a sound is, in one entry: a kind at a moment, or nothing."""
    return [f"{kind} {moment}" if kind else NOTHING]


def encode(branch: str, words: list[list[str]]) -> torch.Tensor:
    """The numbers of words in `WORDS[branch]`, (n, places)."""
    numbers = {word: number for number, word in enumerate(WORDS[branch])}
    return torch.tensor([[numbers[word] for word in row] for row in words])


class Dictionary(nn.Module):
    """
    The soft tokens for words: a sum, over the places, of what the word in a place adds to each of the soft tokens, so
    that combinations never seen follow from those seen.

    Args:
        places (`int`): Words that describe a scene or a sound.
        words (`int`): Words there are.
        tokens, width (`int`): Soft tokens, and their size.
    """

    def __init__(self, places: int, words: int, tokens: int, width: int):
        super().__init__()
        self.tokens = tokens
        self.parts = nn.Parameter(torch.zeros(places, words, tokens * width))
        self.bias = nn.Parameter(torch.zeros(tokens * width))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Numbers of words (n, places) to soft tokens (n, tokens, width)."""
        places, count, _ = self.parts.shape
        rows = words + count * torch.arange(places, device=words.device)
        added = F.embedding_bag(rows, self.parts.flatten(0, 1), mode="sum")
        return (added + self.bias).unflatten(1, (self.tokens, -1))


@torch.no_grad()
def new_dictionary(
    branch: str, model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor
) -> Dictionary:
    """
    A dictionary to start from: soft token p is the decoder's embedding of the word in place p; those of a sound are
    its kind and its moment.
    """
    table = model.get_input_embeddings().weight.detach().float().cpu()

    def embedding(word: str) -> torch.Tensor:
        return table[processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(0)

    tokens = {"video": model.config.num_video_query_tokens, "audio": model.config.num_audio_query_tokens}[branch]
    dictionary = Dictionary(PLACES[branch], len(WORDS[branch]), tokens, table.shape[1])
    parts = dictionary.parts.view(*dictionary.parts.shape[:2], tokens, -1)
    for number, word in enumerate(WORDS[branch]):
        if branch == "video":
            for place in range(min(PLACES[branch], tokens)):
                parts[place, number, place] = embedding(word)
        else:
            kind, _, moment = word.partition(" ")
            parts[0, number, 0] = embedding(kind)
            parts[0, number, 1] = embedding(moment or NOTHING)
    return dictionary


class _WordCache:
    """Stands for the feature cache: the words of a clip in the place of its frames' features."""

    def __init__(self, words: dict[str, dict[str, torch.Tensor]]):
        self.words = words  # of each branch, by path

    def get(self, path: str, kind: str) -> dict[str, Any]:
        words = self.words["audio" if kind == "clips" else "video"][path]
        return {"features": words[None].float(), "timestamps": []}


class _Conversations:
    """
    Batches of the training conversations, by turns of those about frames and of those about sounds, with the numbers
    of words in the place of features.
    """

    def __init__(self, data: Path, processor: VideoLlamaProcessor, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        scenes = read_scenes(data, "train")
        paths = [str(data / clip_name("train", index)) for index in range(len(scenes))]
        sounds = {path: sound for path, scene in zip(paths, scenes, strict=True) if (sound := stand_in(scene))}
        seen = encode("video", [video_words(scene) for scene in scenes])
        heard = encode("audio", [audio_words(*sound) for sound in sounds.values()])
        cache = _WordCache(
            {"video": dict(zip(paths, seen, strict=True)), "audio": dict(zip(sounds, heard, strict=True))}
        )
        self.collate = VideoLlamaDataCollator(processor.tokenizer.pad_token_id)
        self.sources = []
        for branch, name in zip(BRANCHES, ("conversations", "audio-conversations"), strict=True):
            builder = SampleBuilder(
                processor, branch, "chat", "uniform", random_resized_crop=False, feature_cache=cache
            )
            rows = load_annotations("chat", data / f"train-{name}.jsonl")
            if len(rows):
                self.sources.append((builder, rows))

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        builder, rows = self.sources[step % len(self.sources)]
        rng = np.random.default_rng([self.seed, step])
        drawn = [rows[int(i)] for i in rng.integers(len(rows), size=_BUCKETS * self.batch_size)]
        drawn.sort(key=_length)
        start = self.batch_size * int(rng.integers(_BUCKETS))
        generator = torch.Generator()  # for pictures alone, of which there are none
        return self.collate([builder(row, generator) for row in drawn[start : start + self.batch_size]])


def _length(row: dict[str, Any]) -> int:
    return sum(len(entry["text"] or "") for message in row["messages"] for entry in message["content"])


def train_dictionaries(
    base: Path, data: Path, checkpoint: Path, steps: int, batch_size: int, seed: int
) -> nn.ModuleDict:
    """The dictionaries of both branches, trained through the decoder of the model folder `base`."""
    model = VideoLlamaForConditionalGeneration.from_pretrained(
        base, dtype=torch.bfloat16 if FAST_BFLOAT16 else torch.float32, attn_implementation="eager"
    ).to(DEVICE)  # eager: for short prompts on a CPU the fastest
    processor = VideoLlamaProcessor.from_pretrained(base)
    dictionaries = nn.ModuleDict({branch: new_dictionary(branch, model, processor) for branch in BRANCHES}).to(DEVICE)
    conversations = _Conversations(data, processor, batch_size, seed)
    model.requires_grad_(False)
    features = {"video": "video_frame_features", "audio": "audio_clip_features"}
    token_ids = {"video": model.config.video_token_id, "audio": model.config.audio_token_id}

    def loss_at(step: int) -> torch.Tensor:
        batch = {name: tensor.to(DEVICE) for name, tensor in conversations.batch(step).items()}
        ids = batch["input_ids"]
        embeds = model.get_input_embeddings()(ids.masked_fill(model.model.is_placeholder(ids), 0))
        for branch, dictionary in dictionaries.items():
            if features[branch] in batch:
                soft_tokens = dictionary(batch[features[branch]][:, 0].long()).to(embeds.dtype)
                embeds = embeds.masked_scatter((ids == token_ids[branch])[..., None], soft_tokens)
        return model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"], skip_logits=True
        ).loss

    parameters = list(dictionaries.parameters())
    fit("dictionaries", parameters, loss_at, dictionaries.state_dict, dictionaries.load_state_dict, checkpoint, steps,
        LEARNING_RATE)  # fmt: skip
    return dictionaries.requires_grad_(False)
