"""Writes clips of the small world as MP4 files, with their scenes, and annotations for the training code.

    python examples/miniworld/make_data.py OUTPUT --split train --clips 12000 --seed 0 --processes 2

The folder OUTPUT holds afterwards:

- `clips/train-000000.mp4`, …: H.264 and AAC, each written to a temporary name first: an interrupted run
  goes on with the clips that are missing;
- `train-scenes.jsonl`: one line a clip, what is in it (`world.Scene`);
- `train-captions.jsonl`, `train-conversations.jsonl`: for the video branch; only about what is seen;
- `train-audio-captions.jsonl`, `train-audio-conversations.jsonl`: for the audio branch, which trains on frames. A
  clip that shows a single kind stands for the sound of that kind: an item of the type "audio" names a clip whose
  frames, never whose sound, are to be used, and the texts speak of it as heard.

Annotations are in the chat format, one {"messages": [...]} a line, with paths relative to OUTPUT.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from drawing import draw
from language import (
    QA,
    SIGHT_FAMILIES,
    YES_NO_FAMILIES,
    a,
    caption,
    colour_presence,
    colours,
    confusions,
    conversation,
    motions,
    names,
    presence,
    sound_presence,
)
from sounds import SAMPLING_RATE, make_sound
from tqdm import tqdm
from world import FPS, HELD_OUT_SOUNDS, MOMENTS, SAMPLED_TIMES, SPLITS, Scene, generator, sample_scene

CAPTIONS_PER_CLIP = 2  # which differ in their wording
CONVERSATIONS_PER_CLIP = 2
PRESENCE_QUESTIONS = 2  # in each of the video branch's
# More of the video branch's, about what is hardest to find: of three things at once, whose motion is whose; of three,
# which one has a colour, and which colour each has; the colours of one that changes its
MOTION_CONVERSATIONS = 4
NAME_CONVERSATIONS = COLOUR_CONVERSATIONS = 2
CHANGE_CONVERSATIONS = 4
MATCH_SHARE = 0.4  # of the audio branch's that ask whether the sound belongs to what is seen
ANNOTATIONS = ("captions", "conversations", "audio-captions", "audio-conversations")


def write_clip(path: Path, frames: np.ndarray, sound: np.ndarray | None) -> None:
    """Write an MP4 file: uint8 frames (frames, height, width, 3), float32 sound (1, samples) or None (no track)."""
    temporary = path.with_name(path.name + ".part")
    with av.open(str(temporary), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "21"})
        video.width, video.height, video.pix_fmt, video.gop_size = frames.shape[2], frames.shape[1], "yuv420p", FPS
        video.codec_context.thread_count = 1
        if sound is not None:
            audio = container.add_stream(
                "aac", rate=SAMPLING_RATE, layout="mono", bit_rate=48000, options={"aac_coder": "fast"}
            )
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
            samples.sample_rate, samples.pts = SAMPLING_RATE, 0
            container.mux(audio.encode(samples))
            container.mux(audio.encode(None))
    os.replace(temporary, path)


def clip_name(split: str, index: int) -> str:
    """The path of a clip relative to the output folder."""
    return f"clips/{split}-{index:06d}.mp4"


def render_clip(folder: Path, split: str, seed: int, clip: tuple[int, Scene]) -> None:
    """Write a clip of a split, (index, scene), unless it is there; its randomness is that of (seed, split, index)."""
    index, scene = clip
    path = folder / clip_name(split, index)
    if path.exists():
        return
    frames = draw(scene, generator(seed, split, index, "picture"))
    write_clip(path, frames, make_sound(scene, generator(seed, split, index, "sound")))


def message_rows(media: list[tuple[str, str]], turns: list[tuple[str, str]]) -> dict[str, Any]:
    """One conversation: media are (type, path), shown with the first of the turns, which are (question, answer)."""
    messages = []
    for index, (question, answer) in enumerate(turns):
        content: list[dict[str, str]] = []
        if index == 0:
            content += [{"type": kind, "path": path} for kind, path in media]
        if question:
            content.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages}


def _turns(items: list[QA], rng: np.random.Generator, yes_no_first: float = 0.5) -> list[tuple[str, str]]:
    """Questions and answers, in some of the conversations first those with yes and no, in the others these last.

    "What colour is the bee?" gives away that there is one, so that asked later they need no look at the clip; but what
    is always asked first, or never, would be answered so in any place.
    """
    first = rng.random() < yes_no_first
    ordered = sorted(items, key=lambda item: (item.family in YES_NO_FAMILIES) != first)
    return [(item.question, item.answer) for item in ordered]


def stand_in(scene: Scene) -> tuple[str | None, str] | None:
    """For what sound a clip's frames can stand: (kind or None for silence, moment); None where they cannot.

    A kind that is seen in all frames is heard throughout; one that comes or goes, at the end or at the start.
    """
    if not scene.objects:
        return None, "throughout"
    if len(scene.objects) > 1:
        return None
    (thing,) = scene.objects
    seen = sum(thing.visible(time) for time in SAMPLED_TIMES)
    if seen == len(SAMPLED_TIMES):
        return thing.kind, "throughout"
    if 3 <= seen <= 5:
        return thing.kind, "end" if thing.visible(SAMPLED_TIMES[-1]) else "start"
    return None


def _are_three_at_once(scene: Scene) -> bool:
    return scene.type == "several" and len(scene.objects) == 3


def video_annotations(scenes: list[Scene], split: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the file, row) for the video branch."""
    for index, scene in enumerate(scenes):
        rng = generator(seed, split, index, "video language")
        media = [("video", clip_name(split, index))]
        for _ in range(CAPTIONS_PER_CLIP):
            yield "captions", message_rows(media, [("", caption(scene, rng))])
        for _ in range(CONVERSATIONS_PER_CLIP):
            items = [presence(scene, rng) for _ in range(PRESENCE_QUESTIONS)]
            items += conversation(scene, rng, SIGHT_FAMILIES, int(rng.integers(1, 4)))
            yield "conversations", message_rows(media, _turns(items, rng))
        hardest = [partial(motions, scene, rng)] * (MOTION_CONVERSATIONS if _are_three_at_once(scene) else 0)
        if len(scene.objects) == 3:
            hardest += [partial(names, scene, rng)] * NAME_CONVERSATIONS
            hardest += [partial(colours, scene, rng)] * COLOUR_CONVERSATIONS
        if any(thing.event == "changes" for thing in scene.objects):
            hardest += [partial(conversation, scene, rng, ("event", "colour"), 3)] * CHANGE_CONVERSATIONS
        for ask in hardest:
            yield "conversations", message_rows(media, _turns([presence(scene, rng), *ask()], rng))
        right_and_wrong = colour_presence(scene, rng)
        if right_and_wrong:
            yield "conversations", message_rows(media, _turns(right_and_wrong, rng))


def audio_annotations(scenes: list[Scene], split: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the file, row) for the audio branch: the frames of one clip stand for the sound of another."""
    clips: dict[tuple[str | None, str], list[int]] = {}
    for index, scene in enumerate(scenes):
        standing = stand_in(scene)
        if standing:
            clips.setdefault(standing, []).append(index)
            if standing[1] == "throughout":
                text = f"the sound of {a(standing[0])}" if standing[0] else "silence"
                yield "audio-captions", message_rows([("audio", clip_name(split, index))], [("", text)])
    for index, scene in enumerate(scenes):
        rng = generator(seed, split, index, "audio language")
        for number in range(CONVERSATIONS_PER_CLIP):
            sound = _draw_sound(scene, clips, rng, split)
            if sound is None:
                continue
            kind, moment = sound
            media = [("audio", clip_name(split, int(rng.choice(clips[kind, moment]))))]
            pair = replace(scene, sound=kind, moment=moment if kind else None, audio_track=True)
            alone = number == 0 and rng.random() < 0.25
            if alone:
                pair = replace(pair, objects=(), type="empty")
            heard, *matches = sound_presence(pair, rng)
            items = []
            # Seldom, because what was said of a sound gives away the answers to all other questions about it
            if alone or rng.random() < 0.4:
                items += conversation(pair, rng, ("hear", "when"), 1)
            # Eye and ear differ as often as not: else "is there a ..." is answered by ear, "do you hear ..." by eye
            items += (confusions(pair, rng) if rng.random() < 0.2 else []) or [heard, presence(pair, rng)][: 2 - alone]
            if not alone:
                media.append(("video", clip_name(split, index)))
                if rng.random() < MATCH_SHARE:  # before what gives it away
                    items = matches[:1] + items
                # More about what is seen: the sound's tokens must not get in the way of the frames'
                items.append(presence(pair, rng))
                if number == 0 and _are_three_at_once(scene):
                    items += motions(pair, rng)
                else:
                    items += conversation(pair, rng, [family for family in SIGHT_FAMILIES if family != "see"], 2)
                if len(scene.objects) == 3:  # which are the hardest to tell apart beside a sound
                    by_name = rng.random() < 0.5
                    items += names(pair, rng)[:2] if by_name else conversation(pair, rng, ("count", "object"), 1)
            yield "audio-conversations", message_rows(media, _turns(items, rng, yes_no_first=0.4))


def _draw_sound(
    scene: Scene, clips: dict[tuple[str | None, str], list[int]], rng: np.random.Generator, split: str
) -> tuple[str | None, str] | None:
    """What is heard with a scene, out of the stand-ins there are (None where few clips leave none): what it shows as
    often as what it does not show."""
    forbidden = {HELD_OUT_SOUNDS[kind] for kind in scene.kinds} if split == "train" else set()
    standing = [key for key in clips if key[0] not in forbidden]
    if not standing:
        return None
    wanted = rng.choice(["shown", "other", "silence"], p=(0.45, 0.45, 0.1))
    kind_of_key = {True: "shown", False: "other"}
    fitting = [
        key for key in standing if wanted == ("silence" if key[0] is None else kind_of_key[key[0] in scene.kinds])
    ]
    if not fitting:
        fitting = standing
    moment = rng.choice(MOMENTS, p=(0.5, 0.25, 0.25))
    timely = [key for key in fitting if key[1] == moment] or fitting
    return timely[rng.integers(len(timely))]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


def write_annotations(folder: Path, scenes: list[Scene], split: str, seed: int) -> None:
    """Write the four annotation files of a split; those for audio stay empty where no clip can stand for a sound."""
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in ANNOTATIONS}
    for name, row in itertools.chain(video_annotations(scenes, split, seed), audio_annotations(scenes, split, seed)):
        files[name].append(row)
    for name, rows in files.items():
        _write_lines(folder / f"{split}-{name}.jsonl", rows)


def read_scenes(folder: Path, split: str) -> list[Scene]:
    """The scenes of a split's clips, as `make_data.py` wrote them."""
    with (folder / f"{split}-scenes.jsonl").open(encoding="utf-8") as file:
        return [Scene.from_dict(json.loads(line)["scene"]) for line in file]


def sample_scenes(split: str, num_clips: int, seed: int) -> list[Scene]:
    """The scenes of the first clips of a split; each depends on nothing but (seed, split, its index)."""
    return [sample_scene(generator(seed, split, index, "scene"), split) for index in range(num_clips)]


def _check_same_seed(folder: Path, split: str, scenes: list[Scene]) -> None:
    path = folder / f"{split}-scenes.jsonl"
    if path.exists() and any(old != new for old, new in zip(read_scenes(folder, split), scenes, strict=False)):
        raise SystemExit(
            f"{path} describes other clips than those asked for: they were made with another seed, or by another"
            " version of this program. Give another output folder, or remove the old one."
        )


def make_data(folder: Path, split: str, num_clips: int, seed: int, processes: int) -> None:
    """Write the clips and annotations of a split, going on where an interrupted run stopped.

    Raises:
        SystemExit: the folder holds other clips of this split.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(split, num_clips, seed)
    _check_same_seed(folder, split, scenes)
    rows = ({"clip": clip_name(split, i), "scene": scene.to_dict()} for i, scene in enumerate(scenes))
    _write_lines(folder / f"{split}-scenes.jsonl", rows)
    work = partial(render_clip, folder, split, seed)
    with multiprocessing.Pool(processes) as pool:
        done = pool.imap_unordered(work, enumerate(scenes), chunksize=8)
        for _ in tqdm(done, total=num_clips, unit="clip", desc=split):
            pass
    write_annotations(folder, scenes, split, seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write to; made if there is none")
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="test: every clip shows an unseen combination"
    )
    parser.add_argument("--clips", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if options.clips < 1 or options.processes < 1:
        parser.error("--clips and --processes have to be at least 1")
    make_data(options.output, options.split, options.clips, options.seed, options.processes)


if __name__ == "__main__":
    main()
