"""The small world that the example model is trained on: what its clips may show and sound like, drawn from seeds.

The first step of the flow: `drawing.py` paints a [`Scene`], `sounds.py` makes its sound, `language.py` talks about it,
and `make_data.py` writes all of it to files. Nothing here knows about pictures or words.

Lengths and positions are shares of the view's side (0 is left and top), times are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

KINDS = ("bell", "drum", "whistle", "bird", "frog", "bee", "clock", "phone", "horn", "train", "cat", "dog")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = {"small": (0.20, 0.23), "large": (0.35, 0.39)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "circling", "still", "growing", "shrinking")
EVENTS = ("appears", "vanishes", "changes", "bounces")
MOMENTS = ("throughout", "start", "end")
SPLITS = ("train", "test")
SCENE_TYPES = {"motion": 0.30, "event": 0.15, "several": 0.25, "order": 0.26, "empty": 0.04}

SECONDS = 4.0
FPS = 8
NUM_SAMPLED_FRAMES = 8  # what the model is shown: a frame every half second
SAMPLED_TIMES = tuple(SECONDS * i / NUM_SAMPLED_FRAMES for i in range(NUM_SAMPLED_FRAMES))

Box = tuple[float, float, float, float]  # left, top, right, bottom

# Never in the training split: a colour of each kind, a kind of each motion, a sound during the sight of each kind
HELD_OUT_COLOURS = {kind: COLOURS[(5 * i + 3) % len(COLOURS)] for i, kind in enumerate(KINDS)}
HELD_OUT_MOTIONS = {motion: KINDS[(7 * i + 2) % len(KINDS)] for i, motion in enumerate(MOTIONS)}
HELD_OUT_SOUNDS = {kind: KINDS[(i + 5) % len(KINDS)] for i, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Object:
    """One thing in a scene.

    Args:
        size: "small" or "large"; None where it changes (growing, shrinking).
        motion: one of `MOTIONS`, or None: it stays where it is, but that is not what the scene is about.
        event: one of `EVENTS` or None.
        start, stop: when it is visible.
        path: x and y of its centre at `start` and at `stop` (circling: of the circle's centre, bouncing: the floor).
        diameters: its diameter at `start` and at `stop`.
        swing: (radius, turns at the start) when circling, (height, seconds a bounce) when bouncing.
        new_colour, change: its colour from the time `change` on, where it changes.
    """

    kind: str
    colour: str
    size: str | None
    motion: str | None = None
    event: str | None = None
    start: float = 0.0
    stop: float = SECONDS
    path: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    diameters: tuple[float, float] = (0.0, 0.0)
    swing: tuple[float, float] | None = None
    new_colour: str | None = None
    change: float | None = None

    def visible(self, time: float) -> bool:
        return self.start <= time < self.stop

    def colour_at(self, time: float) -> str:
        return self.new_colour if self.change is not None and time >= self.change else self.colour

    def place(self, time: float) -> tuple[float, float, float]:
        """x and y of the centre, and the diameter, at a time at which it is visible."""
        share = (time - self.start) / (self.stop - self.start)
        x0, y0, x1, y1 = self.path
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        if self.motion == "circling":
            radius, turns = self.swing
            angle = 2 * math.pi * (time / SECONDS + turns)
            x, y = x + radius * math.cos(angle), y + radius * math.sin(angle)
        elif self.event == "bounces":
            height, period = self.swing
            y -= height * abs(math.sin(math.pi * time / period))
        d0, d1 = self.diameters
        return x, y, d0 + share * (d1 - d0)

    def box(self) -> Box:
        """Left, top, right and bottom of all that it covers while it is visible."""
        places = [self.place(time) for time in np.linspace(self.start, self.stop, 33)]
        return (
            min(x - d / 2 for x, _, d in places),
            min(y - d / 2 for _, y, d in places),
            max(x + d / 2 for x, _, d in places),
            max(y + d / 2 for _, y, d in places),
        )


@dataclass(frozen=True)
class Scene:
    """What one clip shows and sounds like.

    Args:
        type: one of `SCENE_TYPES`.
        objects: of different kinds and colours; by time of appearance in order scenes, else as in `KINDS`.
        sound: the kind that sounds, or None.
        moment: when it sounds, one of `MOMENTS`; None without sound.
        audio_track: whether the file has a sound track at all.
        noise: level of the background noise of the sound (root mean square, full scale 1), 0 in a silent room.
    """

    type: str
    objects: tuple[Object, ...]
    sound: str | None
    moment: str | None
    audio_track: bool
    noise: float

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(thing.kind for thing in self.objects)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        """Read back what `to_dict` gave, also after a way through JSON."""
        things = [{k: tuple(v) if isinstance(v, list) else v for k, v in thing.items()} for thing in values["objects"]]
        return cls(**{**values, "objects": tuple(Object(**thing) for thing in things)})


def generator(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    """The randomness of clip `index` of a split for one purpose ("scene", "picture", …); nothing else uses it."""
    return np.random.default_rng([seed, SPLITS.index(split), index, *purpose.encode()])


def held_out_sights(scene: Scene) -> list[tuple[str, str]]:
    """The combinations in a scene's pictures that the training split never shows: (kind, colour) or (kind, motion)."""
    colours = [
        (thing.kind, HELD_OUT_COLOURS[thing.kind])
        for thing in scene.objects
        if HELD_OUT_COLOURS[thing.kind] in (thing.colour, thing.new_colour)
    ]
    motions = [(t.kind, t.motion) for t in scene.objects if t.motion and HELD_OUT_MOTIONS[t.motion] == t.kind]
    return colours + motions


def held_out_sounds(scene: Scene) -> list[tuple[str, str]]:
    """The combinations (kind seen, kind heard) in a scene that the training split never has."""
    return [(kind, scene.sound) for kind in scene.kinds if HELD_OUT_SOUNDS[kind] == scene.sound]


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw a scene: of "train" one without any held-out combination, of "test" one with at least one in its pictures.

    Empty scenes have no combinations, so that they are alike in both.
    """
    kind_of_scene = str(rng.choice(list(SCENE_TYPES), p=list(SCENE_TYPES.values())))
    while True:
        objects = _SAMPLERS[kind_of_scene](rng)
        scene = _with_sound(kind_of_scene, objects, rng, split)
        if split == "train" and not held_out_sights(scene) and not held_out_sounds(scene):
            return scene
        if split == "test" and (held_out_sights(scene) or not objects):
            return scene


def _looks(rng: np.random.Generator, count: int) -> list[Object]:
    """Things of different kinds and colours, without a place."""
    kinds = rng.choice(KINDS, count, replace=False)
    colours = rng.choice(COLOURS, count, replace=False)
    sizes = rng.choice(list(SIZES), count)
    things = []
    for kind, colour, size in zip(kinds, colours, sizes, strict=True):
        diameter = rng.uniform(*SIZES[size])
        things.append(Object(str(kind), str(colour), str(size), diameters=(diameter, diameter)))
    return things


def _moved(thing: Object, motion: str, rng: np.random.Generator) -> Object:
    thing = replace(thing, motion=motion)
    if motion in DIRECTIONS:
        distance = rng.uniform(0.32, 0.45)
        dx, dy = DIRECTIONS[motion]
        # Some sideways drift keeps the line from being a giveaway; its mirror image is as likely.
        drift = rng.uniform(-0.04, 0.04)
        return replace(thing, path=(0.0, 0.0, dx * distance + dy * drift, dy * distance + dx * drift))
    if motion == "circling":
        return replace(thing, swing=(rng.uniform(0.15, 0.19), rng.uniform(0, 1)))
    if motion in ("growing", "shrinking"):
        small = rng.uniform(0.17, 0.21)
        diameters = (small, small * rng.uniform(1.9, 2.2))
        return replace(thing, size=None, diameters=diameters if motion == "growing" else diameters[::-1])
    return thing


def _sample_motion(rng: np.random.Generator) -> tuple[Object, ...]:
    motion = str(rng.choice(MOTIONS))
    return _arranged(lambda: [_moved(thing, motion, rng) for thing in _looks(rng, 1)], rng)


def _sample_event(rng: np.random.Generator) -> tuple[Object, ...]:
    (thing,) = _looks(rng, 1)
    event = str(rng.choice(EVENTS))
    time = rng.uniform(1.05, 2.95)
    thing = replace(thing, event=event)
    if event == "appears":
        thing = replace(thing, start=time)
    elif event == "vanishes":
        thing = replace(thing, stop=SECONDS - time)
    elif event == "changes":
        new_colour = str(rng.choice([colour for colour in COLOURS if colour != thing.colour]))
        thing = replace(thing, new_colour=new_colour, change=time)
    else:
        thing = replace(thing, swing=(rng.uniform(0.3, 0.45), rng.uniform(1.3, 1.8)))
    return _arranged(lambda: [thing], rng)


def _sample_several(rng: np.random.Generator) -> tuple[Object, ...]:
    count = int(rng.integers(2, 4))
    motions = [str(motion) for motion in (*rng.choice(MOTIONS, 2, replace=False), "still")[:count]]
    # The motions stay where there is no room, or those that need little of it would become the more frequent ones.
    return _arranged(
        lambda: [_moved(thing, motion, rng) for thing, motion in zip(_looks(rng, count), motions, strict=True)], rng
    )


def _sample_order(rng: np.random.Generator) -> tuple[Object, ...]:
    """Things that appear one after another.

    How long each is there says nothing about its place in the order, and a clip run backwards is as likely: seen in
    random order, the frames do not tell what came first.
    """
    things = _looks(rng, int(rng.integers(2, 4)))
    frames = rng.integers(2, 4 if len(things) == 2 else 3, len(things))  # of those that the model sees
    overlap = int(len(things) == 2 and rng.random() < 0.5)
    free = NUM_SAMPLED_FRAMES - 1 - frames.sum() + overlap  # the first frame is always empty
    first = 1 + int(rng.integers(free + 1))
    begins = first + np.concatenate([[0], np.cumsum(frames - overlap)[:-1]])
    step = SECONDS / NUM_SAMPLED_FRAMES
    shift = rng.uniform(0.1, 0.4)  # between the frames
    things = [
        replace(thing, event="appears", start=float(step * begin - shift), stop=float(step * (begin + count) - shift))
        for thing, begin, count in zip(things, begins, frames, strict=True)
    ]
    if rng.random() < 0.35:
        mover = int(rng.integers(len(things)))
        things[mover] = _moved(things[mover], str(rng.choice(list(DIRECTIONS))), rng)
    return _arranged(lambda: things, rng)


def _sample_empty(rng: np.random.Generator) -> tuple[Object, ...]:
    return ()


_SAMPLERS = {
    "motion": _sample_motion,
    "event": _sample_event,
    "several": _sample_several,
    "order": _sample_order,
    "empty": _sample_empty,
}


def _arranged(make_things: Callable[[], list[Object]], rng: np.random.Generator) -> tuple[Object, ...]:
    while True:
        placed = _arrange(make_things(), rng)
        if placed is not None:
            return placed


def _arrange(things: list[Object], rng: np.random.Generator, margin: float = 0.015) -> tuple[Object, ...] | None:
    """Give each thing its place, so that none leaves the view or covers another; None where there is no room."""
    placed: list[tuple[Object, Box]] = []
    for thing in things:
        left, top, right, bottom = thing.box()
        x0, y0, x1, y1 = thing.path
        for _ in range(20):
            dx = rng.uniform(margin - left, 1 - margin - right)
            dy = rng.uniform(margin - top, 1 - margin - bottom)
            box = (left + dx, top + dy, right + dx, bottom + dy)
            if not any(_meet(thing, other) and _overlap(box, other_box) for other, other_box in placed):
                placed.append((replace(thing, path=(x0 + dx, y0 + dy, x1 + dx, y1 + dy)), box))
                break
        else:
            return None
    arranged = [thing for thing, _ in placed]
    if len({thing.start for thing in arranged}) < len(arranged):  # not one after another
        arranged.sort(key=lambda thing: KINDS.index(thing.kind))
    return tuple(arranged)


def _meet(first: Object, second: Object) -> bool:
    return first.start < second.stop and second.start < first.stop


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _with_sound(kind_of_scene: str, objects: tuple[Object, ...], rng: np.random.Generator, split: str) -> Scene:
    seen = [thing.kind for thing in objects]
    unseen = [kind for kind in KINDS if kind not in seen]
    draw = rng.random()
    sound = None
    if draw < 0.6 and seen:
        sound = str(rng.choice(seen))
    elif draw < 0.85:
        sound = str(rng.choice(unseen))
        opposite = HELD_OUT_SOUNDS[seen[0]] if seen else sound
        if split == "test" and opposite in unseen and rng.random() < 0.5:
            sound = opposite
    moment = str(rng.choice(MOMENTS, p=(0.5, 0.25, 0.25))) if sound else None
    audio_track = sound is not None or rng.random() < 0.67
    noise = 0.0 if rng.random() < 0.05 else float(np.exp(rng.uniform(np.log(0.001), np.log(0.02))))
    return Scene(kind_of_scene, objects, sound, moment, audio_track, noise)
