"""Station 0, the end: starts the two branches, so that the decoder understands them from the first step of stage 1 on.

The soft tokens of each clip are led to those that a dictionary (`dictionary.py`) has for what the clip shows; the
decoder is not asked. Works on the cached features of the training clips, of which the video branch sees the frames in
other orders, too (`rearrange.py`); the audio branch is started on frames, never on sound.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dictionary import Dictionary, audio_words, encode, video_words
from encoders import ATTENTION, DEVICE, autocast, fit
from make_data import clip_name, read_scenes, stand_in
from rearrange import rearrange
from torch import nn
from torch.nn import functional as F
from world import Scene

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.modeling_video_llama_branches import VideoLlamaBranch
from transformers_videollama.training.feature_cache import FeatureCache

LEARNING_RATE = 5e-4
REARRANGED_STEPS = 2.5  # times as many steps with frames in other orders: which way things move is learnt last
_SHARPNESS = 10.0  # of the choice between words, in units of the mean squared distance of two of them

Batch = tuple[torch.Tensor, torch.Tensor]  # memory (n, steps in time, tokens, width), numbers of words (n, places)


class WordLoss(nn.Module):
    """
    How far soft tokens (n, tokens, width) are from those of a dictionary for the words (n, places) of a clip, and
    whether those for another word in one of the places are nearer.

    Args:
        dictionary ([`Dictionary`]): Which soft tokens words should become.
        words (`torch.Tensor`): Those of all clips, (clips, places): no other word is taken for one of a place.
    """

    def __init__(self, dictionary: Dictionary, words: torch.Tensor):
        super().__init__()
        self.dictionary = dictionary
        parts = dictionary.parts
        places, count, _ = parts.shape
        words = words.to(DEVICE)
        known = torch.zeros(places, count, dtype=torch.bool, device=DEVICE)
        known[torch.arange(places), words] = True
        self.known = known
        self.place, self.word = known.nonzero(as_tuple=True)
        self.known_parts = parts[known]
        self.number = known.flatten().cumsum(0).view_as(known) - 1  # of a known word among all of them
        soft_tokens = dictionary(words[:2000]).flatten(1)
        self.variance = (soft_tokens - soft_tokens.mean(0)).square().sum(1).mean()
        products = parts @ parts.mT
        squares = products.diagonal(dim1=1, dim2=2)
        self.apart = squares[:, :, None] + squares[:, None] - 2 * products  # squared, of two words in a place
        pairs = known[:, :, None] & known[:, None] & ~torch.eye(count, dtype=torch.bool, device=DEVICE)
        self.scale = (self.apart * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)

    def knows(self, words: torch.Tensor) -> torch.Tensor:
        """Which rows of words (n, places) have none that was never seen in its place."""
        return self.known[torch.arange(words.shape[1]), words].all(1)

    def distances(self, difference: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """
        Squared distances, in units of the words' own, of what `difference` (n, tokens * width) is away from, if one
        word were another: (n, places, all words), less what it is if none were.
        """
        along = difference @ self.known_parts.T  # (n, known words)
        there = along.gather(1, self.number[torch.arange(words.shape[1]), words])
        apart = self.apart[self.place, words[:, self.place], self.word]
        known = (apart - 2 * (along - there[:, self.place])) / self.scale[self.place].clamp(min=1e-6)
        distances = known.new_full((len(words), *self.number.shape), torch.inf)
        distances[:, self.place, self.word] = known
        return distances

    def nearest(self, soft_tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The word of each place that is nearest while the others are the true ones, (n, places)."""
        return self.distances(soft_tokens.float().flatten(1) - self.dictionary(words).flatten(1), words).argmin(-1)

    def forward(self, soft_tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        difference = soft_tokens.float().flatten(1) - self.dictionary(words).flatten(1)
        logits = -_SHARPNESS * self.distances(difference, words)
        choice = F.cross_entropy(logits.flatten(0, 1), words.flatten())
        return choice + difference.square().sum(1).mean() / self.variance


def stored_batch(memory: torch.Tensor, words: torch.Tensor, rng: np.random.Generator, size: int) -> Batch:
    """Clips drawn at random."""
    rows = torch.from_numpy(rng.integers(len(memory), size=size))
    return memory[rows], words[rows]


def rearranged_batch(
    memory: torch.Tensor,
    words: torch.Tensor,
    scenes: list[Scene],
    share: np.ndarray,
    loss: WordLoss,
    rng: np.random.Generator,
    size: int,
) -> Batch:
    """Clips drawn at random, each with its share, with their frames in another order."""
    rows = rng.choice(len(scenes), size, p=share)
    orders, shown = zip(*(rearrange(scenes[row], rng) for row in rows), strict=True)
    numbers = encode("video", [video_words(scene) for scene in shown])
    frames = torch.tensor(orders)
    known = loss.knows(numbers.to(DEVICE)).cpu()[:, None]  # all are, unless the clips are few
    frames = torch.where(known, frames, torch.arange(frames.shape[1]))
    return memory[torch.from_numpy(rows)[:, None], frames], torch.where(known, numbers, words[rows])


def shares(scenes: list[Scene]) -> np.ndarray:
    """
    How often each clip is drawn: what moves while others come and go is seen for two or three frames only, and what is
    true of one of several things is harder to tell than of one thing alone.
    """
    weights = np.array([_weight(scene) for scene in scenes])
    return weights / weights.sum()


def _weight(scene: Scene) -> float:
    if scene.type == "order" and any(thing.motion for thing in scene.objects):
        return 6.0
    if len(scene.objects) > 1:
        return 3.0 if len(scene.objects) == 2 else 4.0
    return 1.5 if any(thing.event == "changes" for thing in scene.objects) else 1.0


def start_branch(
    name: str,
    branch: VideoLlamaBranch,
    draw: Callable[[np.random.Generator], Batch],
    loss: WordLoss,
    checkpoint: Path,
    steps: int,
    seed: int,
) -> None:
    """Leads the soft tokens of a branch to those for words; `draw` gives the batches."""
    branch.train()

    def loss_at(step: int) -> torch.Tensor:
        memory, words = (tensor.to(DEVICE) for tensor in draw(np.random.default_rng([seed, step])))
        with autocast():
            soft_tokens = branch(memory.float()).pooler_output
        return loss(soft_tokens, words)

    fit(name, list(branch.parameters()), loss_at, branch.state_dict, branch.load_state_dict, checkpoint, steps,
        LEARNING_RATE)  # fmt: skip
    branch.eval()


@torch.no_grad()
def word_score(branch: VideoLlamaBranch, memory: torch.Tensor, words: torch.Tensor, loss: WordLoss) -> float:
    """Share of clips in which each word is nearer than any other in its place."""
    right = [
        loss.nearest(branch(rows.float()).pooler_output, truth) == truth
        for rows, truth in zip(memory.to(DEVICE).split(256), words.to(DEVICE).split(256), strict=True)
    ]
    return float(torch.cat(right).all(-1).float().mean())


def start_branches(
    base: Path,
    output: Path,
    data: Path,
    features: Path,
    work: Path,
    dictionaries: nn.ModuleDict,
    steps: int,
    batch_size: int,
    seed: int,
    num_validation: int,
) -> None:
    """
    Writes the model folder `base` to `output` with its branches started from `dictionaries`; each one's last clips
    tell how well.
    """
    model = VideoLlamaForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, attn_implementation=ATTENTION
    ).to(DEVICE)
    processor = VideoLlamaProcessor.from_pretrained(base)
    work.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache(features)
    scenes = read_scenes(data, "train")
    paths = [data / clip_name("train", index) for index in range(len(scenes))]
    sounds = {index: standing for index, scene in enumerate(scenes) if (standing := stand_in(scene))}
    torch.manual_seed(seed)
    for name, branch, kind, words in (
        ("video", model.model.video_branch, "frames", dict(enumerate(map(video_words, scenes)))),
        ("audio", model.model.audio_branch, "clips", {i: audio_words(*sound) for i, sound in sounds.items()}),
    ):
        memory = torch.stack([cache.get(paths[index], kind)["features"] for index in words])
        memory = memory.view(*memory.shape[:2], -1, memory.shape[-1])  # a clip of sound has one vector
        numbers = encode(name, list(words.values()))
        loss = WordLoss(dictionaries[name], numbers)
        training, validation = slice(-num_validation), slice(-num_validation, None)
        draws = {f"{name} branch": (steps, partial(stored_batch, memory[training], numbers[training]))}
        if name == "video":  # first as they are, from which it is quicker to learn what is where
            shown = scenes[training]
            draws["video branch, rearranged"] = (
                round(REARRANGED_STEPS * steps),
                partial(rearranged_batch, memory[training], numbers[training], shown, shares(shown), loss),
            )
        for title, (number, draw) in draws.items():
            checkpoint = work / f"{title.replace(', ', '_').replace(' ', '_')}.pt"
            start_branch(title, branch, partial(draw, size=batch_size), loss, checkpoint, number, seed)
        score = word_score(branch, memory[validation], numbers[validation], loss)
        print(f"{name} branch: all words right of {score:.1%} of clips not trained on", flush=True)
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(output)
