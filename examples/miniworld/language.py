"""Talks about a scene: captions of what is seen, questions with their answers, and conversations made of them.

Called by `make_data.py` for the training data and by the evaluation, which compares answers by [`normalise`].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from world import COLOURS, DIRECTIONS, KINDS, SIZES, Object, Scene

_FULL_SENTENCE = "Answer in a full sentence."
_FULL_SENTENCE_SHARE = 0.15
_NUMBERS = ("None", "One", "Two", "Three")
_MOTION_ANSWERS = {
    **{direction: f"{direction.capitalize()}." for direction in DIRECTIONS},
    "circling": "It circles.",
    "still": "It stays still.",
    "growing": "It grows.",
    "shrinking": "It shrinks.",
}
_MOTION_VERBS = {
    **{direction: f"moves {direction}" for direction in DIRECTIONS},
    "circling": "circles",
    "still": "stays still",
    "growing": "grows",
    "shrinking": "shrinks",
}
_EVENT_VERBS = {"appears": "appears", "vanishes": "vanishes", "bounces": "bounces"}
_WHEN = {"throughout": "throughout", "start": "at the start", "end": "at the end"}
_OPPOSITES = (("left", "right"), ("up", "down"), ("growing", "shrinking"))

SIGHT_FAMILIES = ("object", "colour", "count", "size", "motion", "direction", "order", "event", "see")
SOUND_FAMILIES = ("hear", "hear_presence", "match", "when")
YES_NO_FAMILIES = ("see", "hear_presence", "match")
FAMILIES = (*SIGHT_FAMILIES, *SOUND_FAMILIES)


def a(noun: str) -> str:
    """A noun phrase with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_YES_NO = ("Yes.", "No.")
_KIND_ANSWERS = tuple(f"{a(kind).capitalize()}." for kind in KINDS)
CHOICES: dict[str, tuple[str, ...]] = {
    "object": _KIND_ANSWERS,
    "colour": tuple(f"{colour.capitalize()}." for colour in COLOURS),
    "count": tuple(f"{number}." for number in _NUMBERS),
    "size": tuple(f"{size.capitalize()}." for size in SIZES),
    "motion": tuple(_MOTION_ANSWERS.values()),
    "direction": tuple(_MOTION_ANSWERS[motion] for pair in _OPPOSITES for motion in pair),
    "order": tuple(f"The {kind}." for kind in KINDS),
    "event": (
        *(f"It {verb}." for verb in _EVENT_VERBS.values()),
        *(f"It turns {colour}." for colour in COLOURS),
    ),
    "see": _YES_NO,
    "hear": (*_KIND_ANSWERS, "Nothing."),
    "hear_presence": _YES_NO,
    "match": _YES_NO,
    "when": tuple(f"{when.capitalize()}." for when in _WHEN.values()),
}


@dataclass(frozen=True)
class QA:
    """A question and its answer.

    Args:
        canonical: the short answer, one of `CHOICES[family]`; `answer` says the same where `short` is False.
        options: the answers that the question leaves open, out of `CHOICES[family]`: chance is one over their number.
    """

    family: str
    question: str
    answer: str
    canonical: str
    short: bool
    options: tuple[str, ...]


def normalise(answer: str) -> str:
    """An answer in the form in which answers are compared: lower case, without punctuation and articles."""
    words = re.sub(r"[^\w\s]", " ", answer.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _name(thing: Object, with_size: bool = True) -> str:
    size = f"{thing.size} " if with_size and thing.size else ""
    return f"{size}{thing.colour} {thing.kind}"


def _verb(thing: Object) -> str:
    if thing.event == "changes":
        return f"turns {thing.new_colour}"
    return _EVENT_VERBS[thing.event] if thing.event else _MOTION_VERBS[thing.motion]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One line about what is seen (never about what is heard), without a full stop. `rng` chooses the wording."""
    things = scene.objects
    if not things:
        return str(rng.choice(("an empty scene", "nothing")))
    if scene.type == "order":
        parts = [a(_name(thing, with_size=len(things) < 3)) for thing in things]
        tails = [f" moving {thing.motion}" if thing.motion else "" for thing in things]
        rest = "".join(f", then {part}{tail}" for part, tail in zip(parts[1:], tails[1:], strict=True))
        if rng.random() < 0.5:
            return f"{parts[0]}{tails[0]} appears first{rest}"
        return f"first {parts[0]}{tails[0]}{rest}"
    parts = [f"{a(_name(thing, with_size=len(things) < 3))} {_verb(thing)}" for thing in things]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2 and rng.random() < 0.5:
        return " and ".join(parts)
    return f"{_NUMBERS[len(parts)].lower()} objects: {', '.join(parts)}"


class _Writer:
    """Collects questions about one scene; chooses phrasings, and which answers are long."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.items: list[QA] = []

    def ask(
        self,
        family: str,
        questions: Sequence[str],
        canonical: str,
        sentence: str,
        options: Iterable[str] | None = None,
        in_steps: bool = False,
    ) -> None:
        """`in_steps`: what takes two steps is always answered by a sentence that takes one after the other; yes or no
        at once is learnt far more slowly. All such sentences are of one length, since batches are."""
        question = str(self.rng.choice(questions))
        short = bool(self.rng.random() >= _FULL_SENTENCE_SHARE)
        options = CHOICES[family] if options is None else tuple(options)
        if in_steps:
            self.items.append(QA(family, question, sentence, canonical, False, options))
        elif short:
            self.items.append(QA(family, question, canonical, canonical, True, options))
        else:
            self.items.append(QA(family, f"{question} {_FULL_SENTENCE}", sentence, canonical, False, options))


def questions(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """All that is asked about a scene, in the order of `FAMILIES`; yes and no are about equally frequent."""
    writer = _Writer(rng)
    things = scene.objects
    if len(things) == 1:
        kind = things[0].kind
        asked = ("What do you see?", "What is in the video?", "Which object is shown?")
        writer.ask("object", asked, f"{a(kind).capitalize()}.", f"I see {a(kind)}.")
    for thing in things:
        if thing.event != "changes":
            _ask_name(writer, thing)
    for thing in things:
        _ask_colour(writer, thing)
    count = len(things)
    noun = "object" if count == 1 else "objects"
    writer.ask(
        "count",
        ("How many objects are there?", "How many objects do you see?", "How many different objects are shown?"),
        f"{_NUMBERS[count]}.",
        f"There {'is' if count == 1 else 'are'} {_NUMBERS[count].lower() if count else 'no'} {noun}.",
    )
    for thing in things:
        if thing.size:
            asked = (
                f"Is the {thing.kind} small or large?",
                f"What size is the {thing.kind}?",
                f"How big is the {thing.kind}?",
            )
            writer.ask("size", asked, f"{thing.size.capitalize()}.", f"The {thing.kind} is {thing.size}.")
    for thing in things:
        if thing.motion:
            _ask_motion(writer, thing)
    if scene.type == "order":
        first, last = things[0].kind, things[-1].kind
        order = [f"The {kind}." for kind in scene.kinds]
        asked = ("What appears first?", "Which object comes first?", "What do you see first?")
        writer.ask("order", asked, f"The {first}.", f"The {first} appears first.", order)
        asked = ("What appears last?", "Which object comes last?", "What do you see last?")
        writer.ask("order", asked, f"The {last}.", f"The {last} appears last.", order)
    elif scene.type == "event":
        (thing,) = things
        asked = (f"What happens to the {thing.kind}?", f"What does the {thing.kind} do?", "What happens?")
        writer.ask("event", asked, f"It {_verb(thing)}.", f"The {thing.kind} {_verb(thing)}.")
    _ask_see(writer, scene)
    _ask_sound(writer, scene)
    return writer.items


def presence(scene: Scene, rng: np.random.Generator) -> QA:
    """A question whether something is seen; yes and no are about equally frequent."""
    writer = _Writer(rng)
    _ask_see(writer, scene)
    return writer.items[0]


def confusions(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """Questions that eye and ear answer differently: whether what is heard and not seen is seen, and whether what is
    seen beside is heard. None where nothing is heard, or nothing else is seen."""
    writer = _Writer(rng)
    silent = [kind for kind in scene.kinds if kind != scene.sound]
    if scene.sound and silent:
        if scene.sound not in scene.kinds:
            _ask_presence(writer, scene.sound, False)
        _ask_sound_presence(writer, str(rng.choice(silent)), False)
    return writer.items


def motions(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """One question about how each thing moves, for those that do, in random order."""
    return _one_of_each([thing for thing in scene.objects if thing.motion], _ask_motion, rng)


def names(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """One question about what each thing is, by its colour, for those that keep theirs, in random order."""
    return _one_of_each([thing for thing in scene.objects if thing.event != "changes"], _ask_name, rng)


def colours(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """One question about the colour of each thing, in random order."""
    return _one_of_each(list(scene.objects), _ask_colour, rng)


def colour_presence(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """Two questions about one thing that keeps its colour: whether there is one of that colour, and of another."""
    things = [thing for thing in scene.objects if thing.event != "changes"]
    if not things:
        return []
    writer = _Writer(rng)
    thing = things[rng.integers(len(things))]
    _ask_presence(writer, f"{thing.colour} {thing.kind}", True)
    other = rng.choice([colour for colour in COLOURS if colour != thing.colour])
    _ask_presence(writer, f"{other} {thing.kind}", False)
    return [writer.items[i] for i in rng.permutation(2)]


def _one_of_each(
    things: Sequence[Object], ask: Callable[[_Writer, Object], None], rng: np.random.Generator
) -> list[QA]:
    """One of the questions that `ask` has about each of the things, in random order."""
    items = []
    for thing in things:
        writer = _Writer(rng)
        ask(writer, thing)
        items.append(writer.items[rng.integers(len(writer.items))])
    return [items[i] for i in rng.permutation(len(items))]


def sound_presence(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """Questions whether something is heard, and whether it is seen, too, as far as they make sense."""
    writer = _Writer(rng)
    _ask_sound(writer, scene)
    return [item for item in writer.items if item.family in YES_NO_FAMILIES]


def _ask_name(writer: _Writer, thing: Object) -> None:
    asked = (f"What is the {thing.colour} object?", f"Which object is {thing.colour}?")
    writer.ask("object", asked, f"{a(thing.kind).capitalize()}.", f"The {thing.colour} object is {a(thing.kind)}.")


def _ask_colour(writer: _Writer, thing: Object) -> None:
    kind = thing.kind
    if thing.event == "changes":
        for colour, when in ((thing.colour, "at the start"), (thing.new_colour, "at the end")):
            asked = (f"What colour is the {kind} {when}?", f"Which colour does the {kind} have {when}?")
            writer.ask("colour", asked, f"{colour.capitalize()}.", f"The {kind} is {colour} {when}.")
    else:
        asked = (
            f"What colour is the {kind}?",
            f"Which colour does the {kind} have?",
            f"What is the colour of the {kind}?",
        )
        writer.ask("colour", asked, f"{thing.colour.capitalize()}.", f"The {kind} is {thing.colour}.")


def _ask_motion(writer: _Writer, thing: Object) -> None:
    kind, answer = thing.kind, _MOTION_ANSWERS[thing.motion]
    sentence = f"The {kind} {_MOTION_VERBS[thing.motion]}."
    writer.ask("motion", (f"How does the {kind} move?", f"What is the motion of the {kind}?"), answer, sentence)
    if thing.motion in DIRECTIONS:
        directions = [_MOTION_ANSWERS[motion] for motion in DIRECTIONS]
        asked = (f"Which way does the {kind} move?", f"In which direction does the {kind} go?")
        writer.ask("motion", asked, answer, sentence, directions)
    for pair in _OPPOSITES:
        if thing.motion in pair:
            first, second = pair if writer.rng.random() < 0.5 else pair[::-1]
            if pair[0] in DIRECTIONS:
                asked = f"Does the {kind} move {first} or {second}?"
            else:
                asked = f"Does the {kind} {'grow or shrink' if first == pair[0] else 'shrink or grow'}?"
            writer.ask("direction", (asked,), answer, sentence, [_MOTION_ANSWERS[motion] for motion in pair])


def _ask_see(writer: _Writer, scene: Scene) -> None:
    rng = writer.rng
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    if scene.objects and rng.random() < 0.6:
        thing = scene.objects[rng.integers(len(scene.objects))]
        if thing.event != "changes" and rng.random() < 0.25:
            wrong = rng.random() < 0.5
            colour = str(rng.choice([c for c in COLOURS if c != thing.colour])) if wrong else thing.colour
            _ask_presence(writer, f"{colour} {thing.kind}", not wrong)
        else:
            _ask_presence(writer, thing.kind, True)
    elif scene.sound in absent and rng.random() < 0.5:
        _ask_presence(writer, scene.sound, False)  # heard, not seen
    else:
        _ask_presence(writer, str(rng.choice(absent)), False)


def _ask_presence(writer: _Writer, noun: str, present: bool) -> None:
    sentence = f"Yes, there is {a(noun)}." if present else f"No, there is no {noun}."
    asked = (f"Is there {a(noun)}?", f"Do you see {a(noun)}?", f"Is {a(noun)} in the video?")
    writer.ask("see", asked, _YES_NO[not present], sentence)


def _ask_sound_presence(writer: _Writer, kind: str, present: bool) -> None:
    sentence = f"Yes, I hear {a(kind)}." if present else f"No, I do not hear {a(kind)}."
    asked = (f"Do you hear {a(kind)}?", f"Can you hear {a(kind)}?", f"Is there the sound of {a(kind)}?")
    writer.ask("hear_presence", asked, _YES_NO[not present], sentence)


def _ask_sound(writer: _Writer, scene: Scene) -> None:
    rng, sound = writer.rng, scene.sound
    asked = ("What do you hear?", "What makes the sound?", "What can be heard?")
    if sound is None:
        writer.ask("hear", asked, "Nothing.", "I hear nothing.")
    else:
        writer.ask("hear", asked, f"{a(sound).capitalize()}.", f"I hear {a(sound)}.")
    if sound is not None and rng.random() < 0.58:
        asked_kind = sound
    else:
        seen = [kind for kind in scene.kinds if kind != sound]
        others = seen if seen and rng.random() < 0.5 else [kind for kind in KINDS if kind != sound]
        asked_kind = str(rng.choice(others))
    _ask_sound_presence(writer, asked_kind, asked_kind == sound)
    if sound is None:
        return
    if scene.objects:
        matches = sound in scene.kinds
        sentence = f"I hear {a(sound)} and see {'it: yes' if matches else 'none: no'}."
        asked = (
            "Does the sound belong to what you see?",
            "Does the sound match the video?",
            "Do you see what makes the sound?",
        )
        writer.ask("match", asked, _YES_NO[not matches], sentence, in_steps=True)
    when = _WHEN[scene.moment]
    asked = ("When do you hear it?", "When is the sound heard?")
    writer.ask("when", asked, f"{when.capitalize()}.", f"I hear it {when}.")


def conversation(scene: Scene, rng: np.random.Generator, families: Sequence[str], turns: int) -> list[QA]:
    """Up to `turns` questions of these families about a scene, in random order, of different families if possible."""
    items = [item for item in questions(scene, rng) if item.family in families]
    order = rng.permutation(len(items))
    chosen: list[QA] = []
    while len(chosen) < min(turns, len(items)):
        used = {item.family for item in chosen}
        left = [items[i] for i in order if items[i] not in chosen]
        chosen.append(next((item for item in left if item.family not in used), left[0]))
    return chosen
