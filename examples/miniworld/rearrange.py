"""Other clips out of the frames of one: what is seen in another order is another motion, event or order of things.

A branch that is started on too few clips knows them by heart, and with them which way each thing moves. Of the same
frames shown backwards, or of one shown again in the place of the next, something else is true, so that it has to look.
"""

from dataclasses import replace

import numpy as np
from world import NUM_SAMPLED_FRAMES, SAMPLED_TIMES, Object, Scene, held_out_sights

_BACKWARDS = {
    **{"left": "right", "right": "left", "up": "down", "down": "up"},
    **{"growing": "shrinking", "shrinking": "growing", "appears": "vanishes", "vanishes": "appears"},
}
_FREEZE_SHARE = 0.25


def rearrange(scene: Scene, rng: np.random.Generator) -> tuple[list[int], Scene]:
    """
    The sampled frames of a clip of the training split in an order drawn at random, and what they show then: never a
    combination that the training split does not have. Times and places in the scene are those of the clip as it was.
    """
    while True:
        frames, things = (_in_turn if scene.type == "order" else _forwards_or_backwards)(scene, rng)
        rearranged = replace(scene, objects=tuple(things))
        if not held_out_sights(rearranged):
            return frames, rearranged


def _forwards_or_backwards(scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[Object]]:
    frames = list(range(NUM_SAMPLED_FRAMES))
    if rng.random() < 0.5:
        return frames, list(scene.objects)
    return frames[::-1], [_backwards(thing) for thing in scene.objects]


def _backwards(thing: Object) -> Object:
    if thing.event == "changes":
        return replace(thing, colour=thing.new_colour, new_colour=thing.colour)
    return replace(
        thing,
        motion=_BACKWARDS.get(thing.motion, thing.motion),
        event=_BACKWARDS.get(thing.event, thing.event),
    )


def _in_turn(scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[Object]]:
    """Things that appear one after another do so in any order, at other times, each of them backwards or frozen."""
    seen = [[i for i, time in enumerate(SAMPLED_TIMES) if thing.visible(time)] for thing in scene.objects]
    if any(set(first) & set(second) for first, second in zip(seen, seen[1:], strict=False)):
        parts = [_turned(sorted({i for frames in seen for i in frames}), list(scene.objects), rng)]
    else:
        parts = [_turned(frames, [thing], rng) for frames, thing in zip(seen, scene.objects, strict=True)]
        parts = [parts[i] for i in rng.permutation(len(parts))]
    shown = [i for frames, _ in parts for i in frames]
    things = [thing for _, of_part in parts for thing in of_part]
    empty = 0  # the first frame of these clips
    before = int(rng.integers(1, NUM_SAMPLED_FRAMES - len(shown) + 1))
    return [empty] * before + shown + [empty] * (NUM_SAMPLED_FRAMES - before - len(shown)), things


def _turned(frames: list[int], things: list[Object], rng: np.random.Generator) -> tuple[list[int], list[Object]]:
    """Things and the frames that show them, as they are, backwards, or a single thing in the first of the frames."""
    draw = rng.random()
    if draw < _FREEZE_SHARE and len(things) == 1:
        return frames[:1] * len(frames), [replace(things[0], motion=None)]
    if draw < (1 + _FREEZE_SHARE) / 2:
        return frames, things
    # Backwards they still appear, one after the other
    return frames[::-1], [replace(thing, motion=_BACKWARDS.get(thing.motion)) for thing in things[::-1]]
