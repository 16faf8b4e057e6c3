"""Station 0: trains the frozen encoders of the small model, which the paper takes from others.

- The frame encoder and the image Q-Former learn to say of each kind of object whether a frame shows it, in which
  colour (as red, green and blue, so that a colour of one kind is the same colour of another), where and how large:
  query k answers for kind k. So do the patches for what covers them, because a small ViT learns shapes faster from
  where they are than through a Q-Former. The heads that read the answers are thrown away afterwards; their words are
  what the video branch will find in the queries. They learn from pictures of many objects (`pictures.py`) and from
  frames of the clips.
- ImageBind's two towers learn one space for frames and sounds, by a supervised contrastive loss (arXiv 2004.11362): a
  frame that shows just one kind and two seconds that hold its sound attract each other, frames and sounds of the same
  kind among themselves as well, and so do empty frames and silence.

Frames and sounds are read from the rendered files by the real processor, once, into arrays in the work folder.
All of this station is trained on a GPU where there is one.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import RGB
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from world import COLOURS, KINDS, SAMPLED_TIMES, SECONDS, Scene

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU and on CPUs with instructions for it bfloat16 is the faster one; on others it takes twice as long as float32
_CPU_HAS = getattr(torch.cpu, "get_capabilities", dict)()
FAST_BFLOAT16 = DEVICE.type == "cuda" or any(_CPU_HAS.get(name) for name in ("amx_bf16", "avx512_bf16"))
ATTENTION = "sdpa" if DEVICE.type == "cuda" else "eager"  # of sequences as short as these; half the time on a CPU
NOTHING = len(KINDS)  # the label of an empty frame and of silence
UNCLEAR = -1  # several kinds in a frame, a sound that is cut off
NUM_WINDOWS = 2  # kept of a sound's eight, which overlap by seven eighths
MIN_OVERLAP = 0.5  # seconds of its sound that a window must hold to count for a kind
TEMPERATURE = 0.1
MAX_GRADIENT_NORM = 1.0
PICTURE_SHARE = 0.75  # of a batch of the frame encoder; the rest are frames of clips
BINS = 10  # of places and diameters
BIN_CENTRES = (torch.arange(BINS) + 0.5) / BINS
PALETTE = torch.tensor([RGB[colour] for colour in COLOURS]) / 255


class _Clips(Dataset):
    """Frames (8, 3, height, width) as bytes and some sound windows of each clip, with what they show and hold."""

    def __init__(self, scenes: list[tuple[str, Scene]], processor: VideoLlamaProcessor, seed: int):
        self.scenes, self.processor, self.seed = scenes, processor, seed

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, scene = self.scenes[index]
        frames = self.processor.video_processor(path, do_rescale=False, do_normalize=False, return_tensors="pt")
        item = {
            "frames": frames["pixel_values_videos"][0].to(torch.uint8),
            "windows": torch.zeros(NUM_WINDOWS, *self.window_shape),
            "window_labels": torch.full((NUM_WINDOWS,), UNCLEAR),
            **describe_frames(scene),
        }
        if scene.audio_track:
            extractor = self.processor.feature_extractor
            sound = extractor(path, return_tensors="pt")["input_features"][0]
            chosen = np.random.default_rng([self.seed, index]).choice(len(sound), NUM_WINDOWS, replace=False)
            step = (SECONDS - extractor.clip_duration) / extractor.num_clips
            item["windows"] = sound[chosen]
            item["window_labels"] = torch.tensor(
                [label_window(scene, step * k, step * k + extractor.clip_duration) for k in chosen]
            )
        return item

    @property
    def window_shape(self) -> tuple[int, int]:
        extractor = self.processor.feature_extractor
        return extractor.feature_size, extractor.num_mel_frames


def describe_frames(scene: Scene) -> dict[str, torch.Tensor]:
    """
    What each sampled frame shows: of each kind whether it is there (frames, kinds), its colour, red, green and blue
    from 0 to 1, and its place, centre and diameter (both (frames, kinds, 3), 0 where it is not).
    """
    shown = torch.zeros(len(SAMPLED_TIMES), len(KINDS), dtype=torch.bool)
    rgb, places = torch.zeros(2, len(SAMPLED_TIMES), len(KINDS), 3)
    for row, time in enumerate(SAMPLED_TIMES):
        for thing in scene.objects:
            if thing.visible(time):
                column = KINDS.index(thing.kind)
                shown[row, column] = True
                rgb[row, column] = PALETTE[COLOURS.index(thing.colour_at(time))]
                places[row, column] = torch.tensor(thing.place(time))
    return {"shown": shown, "rgb": rgb, "places": places}


def label_frames(shown: torch.Tensor) -> torch.Tensor:
    """The one kind that frames show, for the contrastive loss."""
    number = shown.sum(-1)
    kind = shown.int().argmax(-1)
    return torch.where(number == 1, kind, torch.where(number == 0, NOTHING, UNCLEAR))


def label_window(scene: Scene, start: float, stop: float) -> int:
    """The kind that sounds between two times."""
    if scene.sound is None:
        return NOTHING
    first, last = {"throughout": (0.0, SECONDS), "start": (0.0, SECONDS / 2), "end": (SECONDS / 2, SECONDS)}[
        scene.moment
    ]
    overlap = min(stop, last) - max(start, first)
    if overlap >= MIN_OVERLAP:
        return KINDS.index(scene.sound)
    return NOTHING if overlap <= 0 else UNCLEAR


def read_clips(
    data: Path, processor: VideoLlamaProcessor, work: Path, seed: int, workers: int
) -> dict[str, np.ndarray]:
    """The training clips as arrays, one row a clip; made at the first call, read from the work folder afterwards."""
    lines = (data / "train-scenes.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    scenes = [(str(data / row["clip"]), Scene.from_dict(row["scene"])) for row in rows]
    clips = _Clips(scenes, processor, seed)
    size = processor.video_processor.size
    num_frames = len(SAMPLED_TIMES)
    columns: dict[str, tuple[tuple[int, ...], type]] = {
        "frames": ((num_frames, 3, size["height"], size["width"]), np.uint8),
        "windows": ((NUM_WINDOWS, *clips.window_shape), np.float16),
        "window_labels": ((NUM_WINDOWS,), np.int64),
        "shown": ((num_frames, len(KINDS)), np.bool_),
        "rgb": ((num_frames, len(KINDS), 3), np.float32),
        "places": ((num_frames, len(KINDS), 3), np.float32),
    }
    paths = {name: work / f"{name}-{len(scenes)}.npy" for name in columns}
    if not all(path.exists() for path in paths.values()):
        work.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: np.lib.format.open_memmap(work / f"{name}.tmp", "w+", dtype, (len(scenes), *shape))
            for name, (shape, dtype) in columns.items()
        }
        loader = DataLoader(clips, batch_size=16, num_workers=workers)
        start = 0
        for batch in tqdm(loader, desc="reading clips", unit="batch"):
            stop = start + len(batch["frames"])
            for name, array in arrays.items():
                array[start:stop] = batch[name].numpy()
            start = stop
        for name, array in arrays.items():
            array.flush()
            (work / f"{name}.tmp").rename(paths[name])
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


class FrameHeads(nn.Module):
    """
    Reads the answers of queries and of patches.

    Queries (n, kinds, query_width): its kind, or that it is not there (kinds + 1), its colour (3), where and how large
    (3 x `BINS`: shares of x, y and diameter, which lie between the centres of two bins).
    Patches (n, patches, patch_width): which kind covers it, if any (kinds + 1), in which colour (3).

    A query has to say which kind it is the query of, because the video branch sees queries without their order.
    """

    def __init__(self, query_width: int, patch_width: int):
        super().__init__()
        self.queries = nn.Linear(query_width, len(KINDS) + 1 + 3 + 3 * BINS)
        self.patches = nn.Linear(patch_width, len(KINDS) + 1 + 3)

    def read_queries(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kind, rgb, place = self.queries(queries).split([len(KINDS) + 1, 3, 3 * BINS], dim=-1)
        return kind, rgb, place.unflatten(-1, (3, BINS))

    def read_patches(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kind, rgb = self.patches(patches).split([len(KINDS) + 1, 3], dim=-1)
        return kind, rgb


def _answers(shown: torch.Tensor) -> torch.Tensor:
    """What query k has to say: its kind k, or that it is not there (n, kinds)."""
    return torch.where(shown, torch.arange(len(KINDS), device=shown.device), NOTHING)


def cover_patches(shown: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    """
    Which kind covers the centre of each of rows x rows patches (n, patches), from what frames show; else NOTHING.
    """
    centres = (torch.arange(rows, device=shown.device) + 0.5) / rows
    y, x = (grid.flatten() for grid in torch.meshgrid(centres, centres, indexing="ij"))
    distance = torch.maximum((x - places[..., 0:1]).abs(), (y - places[..., 1:2]).abs())  # (n, kinds, patches)
    inside = (distance < 0.9 * places[..., 2:3] / 2) & shown[..., None]
    return torch.where(inside.any(1), inside.int().argmax(1), NOTHING)


def bin_shares(places: torch.Tensor) -> torch.Tensor:
    """Places (n, 3) as shares of the two nearest bins, whose mean they are: (n, 3, BINS)."""
    distance = (places[..., None] - BIN_CENTRES.to(places.device)).abs() * BINS
    return (1 - distance).clamp(min=0)


def frame_loss(
    heads: FrameHeads,
    queries: torch.Tensor,
    patches: torch.Tensor,
    shown: torch.Tensor,
    rgb: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """Which kinds are there, colour and place of those that are; kind and colour of what covers patches."""
    query_logits, query_rgb, place = heads.read_queries(queries)
    answers = _answers(shown)
    loss = 2 * F.cross_entropy(query_logits.flatten(0, 1), answers.flatten())
    kind_logits, patch_rgb = heads.read_patches(patches)
    kinds = cover_patches(shown, places, math.isqrt(patches.shape[1]))
    loss = loss + 3 * F.cross_entropy(kind_logits.flatten(0, 1), kinds.flatten())
    covered = kinds != NOTHING
    if covered.any():
        frame, _ = covered.nonzero(as_tuple=True)
        loss = loss + 5 * F.smooth_l1_loss(patch_rgb[covered], rgb[frame, kinds[covered]], beta=0.1)
        loss = loss + 5 * F.smooth_l1_loss(query_rgb[shown], rgb[shown], beta=0.1)
        loss = loss + F.cross_entropy(place[shown].flatten(0, 1), bin_shares(places[shown]).flatten(0, 1))
    return loss


def contrastive_loss(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Supervised contrastive loss of normalised vectors (n, width): those of one label attract each other."""
    logits = vectors @ vectors.T / TEMPERATURE
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_probabilities = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~itself
    has_positive = positive.any(1)
    means = (log_probabilities * positive).sum(1)[has_positive] / positive.sum(1)[has_positive]
    return -means.mean()


def fit(
    name: str,
    parameters: list[nn.Parameter],
    loss_at: Callable[[int], torch.Tensor],
    state: Callable[[], dict[str, Any]],
    restore: Callable[[dict[str, Any]], None],
    checkpoint: Path,
    steps: int,
    learning_rate: float,
) -> None:
    """
    A training loop that goes on where it was interrupted: AdamW, a short warm-up, a cosine to zero.

    Args:
        loss_at: The loss of a step; all that is random in it follows from the step's number.
        state, restore: What is trained, to be kept in the file `checkpoint` every 100 steps.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, fused=True)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))
    )
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        restore(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    average = None
    with tqdm(range(first, steps), initial=first, total=steps, desc=name) as bar:
        for step in bar:
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}")
            if (step + 1) % 100 == 0 or step + 1 == steps:
                saved = {
                    "model": state(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                }
                temporary = checkpoint.with_suffix(".tmp")
                torch.save(saved, temporary)
                os.replace(temporary, checkpoint)


def train_frame_encoder(
    model: VideoLlamaForConditionalGeneration,
    processor: VideoLlamaProcessor,
    clips: dict[str, np.ndarray],
    pictures: dict[str, np.ndarray],
    work: Path,
    steps: int,
    batch_size: int,
    seed: int,
) -> FrameHeads:
    """Trains the ViT and the image Q-Former; the heads are returned for [`frame_scores`]."""
    model.to(DEVICE)
    model.set_trainable(["vision_tower", "qformer"])
    model.train()
    torch.manual_seed(seed)
    config = model.config
    heads = FrameHeads(config.qformer_config.hidden_size, config.vision_config.hidden_size).to(DEVICE)
    parts = nn.ModuleDict({"vision_tower": model.model.vision_tower, "qformer": model.model.qformer, "heads": heads})
    parameters = [*parts.parameters(), model.model.query_tokens]
    # Frames that show more are drawn more often
    chances = np.cumsum(0.3 + clips["shown"].sum(-1).flatten())
    num_frames = clips["frames"].shape[1]
    num_pictures = round(PICTURE_SHARE * batch_size)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 0, step])
        picture = rng.integers(len(pictures["frames"]), size=num_pictures)
        frame = np.searchsorted(chances, chances[-1] * rng.random(batch_size - num_pictures))
        batch = {
            name: _on_device(np.concatenate([pictures[name][picture], clips[name][divmod(frame, num_frames)]]))
            for name in pictures
        }
        pixels = _normalise(batch.pop("frames"), processor)
        with autocast():
            patches = model.model.vision_tower(pixels).last_hidden_state
            queries = model.model.qformer(
                query_embeds=model.model.query_tokens.expand(len(pixels), -1, -1), encoder_hidden_states=patches
            ).last_hidden_state
        return frame_loss(heads, queries.float(), patches[:, 1:].float(), **batch)  # the first is the class token's

    def state() -> dict[str, Any]:
        return {"parts": parts.state_dict(), "query_tokens": model.model.query_tokens.detach()}

    def restore(saved: dict[str, Any]) -> None:
        parts.load_state_dict(saved["parts"])
        model.model.query_tokens.data.copy_(saved["query_tokens"])

    fit("frame encoder", parameters, loss_at, state, restore, work / "frame_encoder.pt", steps, 1e-3)
    model.eval()
    return heads


def train_imagebind(
    model: VideoLlamaForConditionalGeneration,
    processor: VideoLlamaProcessor,
    clips: dict[str, np.ndarray],
    work: Path,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """
    Trains ImageBind's towers; every batch is half frames, half sounds, with every kind about as often. Like
    ImageBind's own, the vision tower starts from an image encoder that is trained already: the frame encoder.
    """
    copy_image_encoder(model.to(DEVICE))
    model.set_trainable(["audio_tower", "audio_vision_tower"])
    model.train()
    towers = nn.ModuleDict({"sound": model.model.audio_tower, "frames": model.model.audio_vision_tower})
    # Vectors of both stay on the sphere: the factor of sounds is part of the published computation, not of the loss
    model.model.audio_tower.logit_scale.requires_grad_(False)
    parameters = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    places = {}
    for name, labels in (("frames", label_frames(torch.from_numpy(clips["shown"][:])).numpy()),
                         ("windows", clips["window_labels"][:])):  # fmt: skip
        places[name] = [np.argwhere(labels == label) for label in range(NOTHING + 1)]

    def draw(name: str, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        present = np.array([label for label, found in enumerate(places[name]) if len(found)])
        labels = rng.choice(present, size=batch_size // 2)
        rows = np.stack([places[name][label][rng.integers(len(places[name][label]))] for label in labels])
        return _on_device(clips[name][rows[:, 0], rows[:, 1]]), _on_device(labels)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, step])
        frames, frame_labels = draw("frames", rng)
        windows, window_labels = draw("windows", rng)
        with autocast():
            seen = model.model.get_clip_features(pixel_values_videos=_normalise(frames, processor)[:, None])
            heard = model.model.get_clip_features(input_features=windows.float()[:, None])
        vectors = torch.cat([seen.last_hidden_state, heard.last_hidden_state]).flatten(0, 1).float()
        return contrastive_loss(F.normalize(vectors, dim=-1), torch.cat([frame_labels, window_labels]))

    fit(
        "ImageBind", parameters, loss_at, towers.state_dict, towers.load_state_dict, work / "imagebind.pt", steps, 1e-3
    )
    model.eval()


@torch.no_grad()
def copy_image_encoder(model: VideoLlamaForConditionalGeneration) -> None:
    """Starts ImageBind's vision tower from the frame encoder, which differs in what happens before the first layer."""
    source, target = model.model.vision_tower, model.model.audio_vision_tower
    target.encoder.load_state_dict(
        source.encoder.state_dict(), strict=False
    )  # has biases of keys, which change nothing
    target.post_layernorm.load_state_dict(source.post_layernorm.state_dict())
    target.embeddings.class_embedding.copy_(source.embeddings.class_embedding)
    patches, repeats = source.embeddings.patch_embedding, target.config.temporal_patch_size
    target.embeddings.patch_embedding.weight.copy_(
        patches.weight.unsqueeze(2).expand(-1, -1, repeats, -1, -1) / repeats
    )
    target.embeddings.position_embedding.copy_(source.embeddings.position_embedding)
    target.embeddings.position_embedding[:, 1:] += patches.bias  # of which the target's patches have none


@torch.no_grad()
def frame_scores(
    model: VideoLlamaForConditionalGeneration,
    heads: FrameHeads,
    processor: VideoLlamaProcessor,
    clips: dict[str, np.ndarray],
    rows: slice,
) -> dict[str, float]:
    """
    How well frames of some clips are described: kinds all right, colour right, distance of the centre (view = 1).
    """
    frames, shown, rgb, places = (
        _on_device(clips[name][rows]).flatten(0, 1) for name in ("frames", "shown", "rgb", "places")
    )
    queries = model.model.get_frame_features(_normalise(frames, processor)).last_hidden_state
    kind, colour, place_logits = heads.read_queries(queries)
    place = place_logits.softmax(-1) @ BIN_CENTRES.to(DEVICE)

    def named(values: torch.Tensor) -> torch.Tensor:  # the nearest colour of the world
        return torch.cdist(values, PALETTE.to(DEVICE)).argmin(-1)

    return {
        "kinds": float((kind.argmax(-1) == _answers(shown)).all(-1).float().mean()),
        "colour": float((named(colour[shown]) == named(rgb[shown])).float().mean()),
        "place": float((place - places)[shown][:, :2].norm(dim=-1).mean()),
    }


@torch.no_grad()
def hearing_score(
    model: VideoLlamaForConditionalGeneration,
    processor: VideoLlamaProcessor,
    clips: dict[str, np.ndarray],
    rows: slice,
) -> float:
    """Share of sounds whose nearest mean frame vector, of the kinds and of nothing, is the right one."""
    frames, labels = (
        _on_device(clips["frames"][rows]).flatten(0, 1),
        label_frames(_on_device(clips["shown"][rows])).flatten(),
    )
    seen = model.model.get_clip_features(pixel_values_videos=_normalise(frames, processor)[:, None]).last_hidden_state
    means = torch.stack([seen[labels == label].mean((0, 1)) for label in range(NOTHING + 1)])
    windows, window_labels = (
        _on_device(clips["windows"][rows]).flatten(0, 1),
        _on_device(clips["window_labels"][rows]).flatten(),
    )
    clear = window_labels != UNCLEAR
    heard = model.model.get_clip_features(input_features=windows[clear].float()[:, None]).last_hidden_state[:, 0]
    guesses = (F.normalize(heard, dim=-1) @ F.normalize(means, dim=-1).T).argmax(-1)
    return float((guesses == window_labels[clear]).float().mean())


def autocast() -> torch.autocast:
    """In bfloat16 where that is faster."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=FAST_BFLOAT16)


def _on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def _normalise(frames: torch.Tensor, processor: VideoLlamaProcessor) -> torch.Tensor:
    video_processor = processor.video_processor
    mean, std = (
        torch.tensor(values, device=frames.device).view(3, 1, 1)
        for values in (video_processor.image_mean, video_processor.image_std)
    )
    return (frames.float() / 255 - mean) / std
