"""Station 0, the end: starts the two branches, so that the decoder understands them from the first step of stage 1 on.

The published code can start the projector in front of the decoder from MiniGPT-4's. Nobody has trained one for frames
and a decoder as small as ours, so each soft token is led here to the decoder's embedding of one word ([`video_words`],
[`audio_words`]); the decoder is not asked. From random soft tokens stage 2 learns what is in a clip, but not to find
what is asked about among several things.

Works on the cached features of the training clips; the audio branch is started on frames, never on sound.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from encoders import fit
from make_data import clip_name, read_scenes, stand_in
from torch import nn
from torch.nn import functional as F
from world import COLOURS, DIRECTIONS, EVENTS, KINDS, MOMENTS, SIZES, Object, Scene

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.modeling_video_llama_branches import VideoLlamaBranch
from transformers_videollama.training.feature_cache import FeatureCache

MAX_OBJECTS = 3
NOTHING = "none"
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
_WORDS = (*_NUMBERS, *SIZES, *COLOURS, *KINDS, *_MOTIONS.values(), *_EVENTS.values(), *_ORDER[3], "sound", *MOMENTS)
_SHARPNESS = 10.0  # of the choice between words, in units of the mean squared distance of two of them


def video_words(scene: Scene) -> list[str]:
    """The words that the soft tokens of a clip start as: how many objects, then five words about each."""
    words = [_NUMBERS[len(scene.objects)]]
    for index, thing in enumerate(scene.objects):
        order = _ORDER[len(scene.objects)][index] if scene.type == "order" else None
        words += [thing.size or NOTHING, thing.colour, thing.kind, _verb(thing), order or thing.new_colour or NOTHING]
    return words + [NOTHING] * (1 + 5 * MAX_OBJECTS - len(words))


def _verb(thing: Object) -> str:
    return _MOTIONS[thing.motion] if thing.motion else _EVENTS[thing.event]


def audio_words(kind: str | None, moment: str) -> list[str]:
    """The words that the soft tokens of a sound start as, which makes the kind's frames stand for the kind's sound."""
    return ["sound", kind or NOTHING, moment if kind else NOTHING, NOTHING]


class WordLoss(nn.Module):
    """How far soft tokens (n, tokens, width) are from the words they should be, and whether others are nearer."""

    def __init__(self, model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor):
        super().__init__()
        table = model.get_input_embeddings().weight.detach().float()
        self.words = list(dict.fromkeys(_WORDS))
        ids = [processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in self.words]
        self.register_buffer("embeddings", torch.stack([table[word].mean(0) for word in ids]))
        self.scale = torch.pdist(self.embeddings).square().mean()

    def encode(self, words: list[list[str]]) -> torch.Tensor:
        """The numbers of words, (n, tokens)."""
        numbers = {word: number for number, word in enumerate(self.words)}
        return torch.tensor([[numbers[word] for word in row] for row in words])

    def distances(self, soft_tokens: torch.Tensor) -> torch.Tensor:
        """Squared distances from all words, (n, tokens, words), in units of the words' own."""
        return torch.cdist(soft_tokens.float(), self.embeddings).square() / self.scale

    def forward(self, soft_tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        distances = self.distances(soft_tokens)
        choice = F.cross_entropy(-_SHARPNESS * distances.flatten(0, 1), words.flatten())
        return choice + distances.gather(-1, words[..., None]).mean()


def start_branch(
    name: str,
    branch: VideoLlamaBranch,
    memory: torch.Tensor,
    words: torch.Tensor,
    loss: WordLoss,
    checkpoint: Path,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Leads the soft tokens of cached features (clips, steps in time, tokens, width) to words (clips, soft tokens)."""
    branch.train()

    def loss_at(step: int) -> torch.Tensor:
        rows = torch.from_numpy(np.random.default_rng([seed, step]).integers(len(memory), size=batch_size))
        with torch.autocast("cpu", torch.bfloat16):
            soft_tokens = branch(memory[rows].float()).pooler_output
        return loss(soft_tokens, words[rows])

    fit(name, list(branch.parameters()), loss_at, branch.state_dict, branch.load_state_dict, checkpoint, steps, 5e-4)
    branch.eval()


@torch.no_grad()
def word_score(branch: VideoLlamaBranch, memory: torch.Tensor, words: torch.Tensor, loss: WordLoss) -> float:
    """Share of clips all of whose soft tokens are nearest to their words."""
    nearest = [loss.distances(branch(rows.float()).pooler_output).argmin(-1) for rows in memory.split(256)]
    return float((torch.cat(nearest) == words).all(-1).float().mean())


def start_branches(
    base: Path,
    output: Path,
    data: Path,
    features: Path,
    work: Path,
    steps: int,
    batch_size: int,
    seed: int,
    num_validation: int,
) -> None:
    """
    Writes the model folder `base` to `output` with its branches started; each one's last clips tell how well.
    """
    model = VideoLlamaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    processor = VideoLlamaProcessor.from_pretrained(base)
    work.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache(features)
    scenes = read_scenes(data, "train")
    paths = [data / clip_name("train", index) for index in range(len(scenes))]
    sounds = {index: standing for index, scene in enumerate(scenes) if (standing := stand_in(scene))}
    loss = WordLoss(model, processor)
    torch.manual_seed(seed)
    for name, branch, kind, words in (
        ("video branch", model.model.video_branch, "frames", dict(enumerate(map(video_words, scenes)))),
        ("audio branch", model.model.audio_branch, "clips", {i: audio_words(*sound) for i, sound in sounds.items()}),
    ):
        memory = torch.stack([cache.get(paths[index], kind)["features"] for index in words])
        memory = memory.view(*memory.shape[:2], -1, memory.shape[-1])  # a clip of sound has one vector
        numbers = loss.encode(list(words.values()))
        training, validation = slice(-num_validation), slice(-num_validation, None)
        checkpoint = work / f"{name.replace(' ', '_')}.pt"
        start_branch(name, branch, memory[training], numbers[training], loss, checkpoint, steps, batch_size, seed)
        score = word_score(branch, memory[validation], numbers[validation], loss)
        print(f"{name}: all words right of {score:.1%} of clips not trained on", flush=True)
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(output)
