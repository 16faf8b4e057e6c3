"""The example's small world: what its clips show and sound like, what is said about them, and its files."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "miniworld"))

import make_data
from drawing import NUM_FRAMES, RGB, VIEW, draw, sprite
from language import (
    CHOICES,
    FAMILIES,
    SIGHT_FAMILIES,
    SOUND_FAMILIES,
    caption,
    colour_presence,
    colours,
    conversation,
    motions,
    names,
    normalise,
    questions,
)
from pictures import MIN_DISTANCE, draw_picture
from rearrange import rearrange
from sounds import NUM_SAMPLES, SAMPLING_RATE, kind_sound, make_sound
from world import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT_COLOURS,
    HELD_OUT_MOTIONS,
    HELD_OUT_SOUNDS,
    KINDS,
    MOTIONS,
    SAMPLED_TIMES,
    SCENE_TYPES,
    Scene,
    generator,
    held_out_sights,
    held_out_sounds,
)

from transformers_videollama.media import read_audio, read_video

NUM_SCENES = 600


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: make_data.sample_scenes(split, NUM_SCENES, 3) for split in ("train", "test")}


def test_training_never_shows_what_is_held_out_and_testing_always_does(scenes):
    pairs = defaultdict(set)
    for scene in scenes["train"]:
        assert not held_out_sights(scene) and not held_out_sounds(scene)
        for thing in scene.objects:
            assert HELD_OUT_COLOURS[thing.kind] not in (thing.colour, thing.new_colour)
            assert thing.motion is None or HELD_OUT_MOTIONS[thing.motion] != thing.kind
            assert HELD_OUT_SOUNDS[thing.kind] != scene.sound
            pairs["colours"].add((thing.kind, thing.colour))
    # and all the rest is there
    assert pairs["colours"] == {(k, c) for k in KINDS for c in COLOURS if HELD_OUT_COLOURS[k] != c}
    assert all(held_out_sights(scene) for scene in scenes["test"] if scene.type != "empty")
    assert any(held_out_sounds(scene) for scene in scenes["test"])
    assert len(HELD_OUT_COLOURS) == 12 and len(set(HELD_OUT_MOTIONS.values())) == len(MOTIONS) == 8
    assert all(HELD_OUT_SOUNDS[kind] != kind for kind in KINDS)


def test_pictures_keep_held_out_colours_away_from_their_kinds_and_tell_where_things_are():
    seen = set()
    for index in range(150):
        picture, (shown, rgb, places) = draw_picture(5, index)
        again, _ = draw_picture(5, index)
        assert picture.shape == (VIEW, VIEW, 3) and picture.dtype == np.uint8 and np.array_equal(picture, again)
        assert 1 <= shown.sum() <= 7 and not rgb[~shown].any() and not places[~shown].any()
        for k in np.flatnonzero(shown):
            kind, colour = KINDS[k], 255 * rgb[k]
            assert np.linalg.norm(colour - RGB[HELD_OUT_COLOURS[kind]]) >= MIN_DISTANCE
            seen |= {(kind, name) for name in COLOURS if np.array_equal(np.round(colour), RGB[name])}
            x, y, diameter = places[k]
            assert diameter / 2 <= min(x, y) and max(x, y) <= 1 - diameter / 2
            left, top = round((x - diameter / 2) * VIEW), round((y - diameter / 2) * VIEW)
            side = round(diameter * VIEW)
            part = picture[top : top + side, left : left + side].reshape(-1, 3).astype(float)
            assert (np.abs(part - colour).max(1) < 30).mean() > 0.1, (kind, index)
    assert len(seen) > 80 and not {(kind, colour) for kind, colour in HELD_OUT_COLOURS.items()} & seen


def test_scene_depends_on_seed_split_and_index_alone(scenes):
    assert make_data.sample_scenes("train", 5, 3) == scenes["train"][:5]
    assert make_data.sample_scenes("train", 5, 4) != scenes["train"][:5]
    for scene in scenes["test"][:50]:
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@pytest.mark.parametrize("split", ["train", "test"])
def test_shares_and_layout(scenes, split):
    types = Counter(scene.type for scene in scenes[split])
    for name, share in SCENE_TYPES.items():
        assert types[name] / NUM_SCENES == pytest.approx(share, abs=0.06)
    for scene in scenes[split]:
        assert len(set(scene.kinds)) == len({thing.colour for thing in scene.objects}) == len(scene.objects) <= 3
        for thing in scene.objects:
            left, top, right, bottom = thing.box()
            assert left > 0 and top > 0 and right < 1 and bottom < 1
            if thing.motion in ("left", "right", "up", "down"):
                x0, y0, x1, y1 = thing.path
                assert max(abs(x1 - x0), abs(y1 - y0)) >= 0.3
            if thing.size is None:
                assert max(thing.diameters) >= 1.8 * min(thing.diameters)
        for time in SAMPLED_TIMES:
            boxes = [(*thing.place(time), thing.kind) for thing in scene.objects if thing.visible(time)]
            for i, (x, y, d, _) in enumerate(boxes):
                for other_x, other_y, other_d, _ in boxes[:i]:
                    assert max(abs(x - other_x), abs(y - other_y)) >= (d + other_d) / 2 - 1e-6


def test_order_shows_in_the_sampled_frames_but_only_in_their_order(scenes):
    waiting = defaultdict(list)
    for scene in scenes["train"] + scenes["test"]:
        if scene.type != "order":
            continue
        seen = [[time for time in SAMPLED_TIMES if thing.visible(time)] for thing in scene.objects]
        starts = [thing.start for thing in scene.objects]
        assert all(later - earlier >= 0.45 for earlier, later in zip(starts, starts[1:], strict=False))
        assert not any(thing.visible(0) for thing in scene.objects)
        assert all(len(times) >= 2 for times in seen) and sorted(t[0] for t in seen) == [t[0] for t in seen]
        waiting[len(seen)].append(len(seen[0]) - len(seen[-1]))
    # What comes first is not there for longer: frames in random order do not give it away.
    assert all(abs(np.mean(np.sign(differences))) < 0.2 for differences in waiting.values())


def test_rearranged_frames_show_what_is_said_of_them(scenes):
    rng = np.random.default_rng(0)
    drawn = Counter()
    for scene in scenes["train"]:
        frames, shown = rearrange(scene, rng)
        assert len(frames) == len(SAMPLED_TIMES) and not held_out_sights(shown)
        assert sorted(shown.kinds) == sorted(scene.kinds)
        times = [SAMPLED_TIMES[i] for i in frames]
        begins = []
        for thing in shown.objects:
            before = next(other for other in scene.objects if other.kind == thing.kind)
            seen = [i for i, time in enumerate(times) if before.visible(time)]
            begins.append(seen[0])
            (x0, y0, d0), (x1, y1, d1) = (before.place(times[seen[0]]), before.place(times[seen[-1]]))
            if thing.motion in DIRECTIONS:
                dx, dy = DIRECTIONS[thing.motion]
                assert (x1 - x0) * dx + (y1 - y0) * dy > 0.1
            elif thing.motion in ("growing", "shrinking"):
                assert (d1 > d0) == (thing.motion == "growing")
            elif thing.motion is None and scene.type == "order":
                assert (x0, y0) == (x1, y1)
            if thing.event in ("appears", "vanishes") and scene.type == "event":
                assert (seen[0] > 0, seen[-1] < len(times) - 1) == (
                    thing.event == "appears",
                    thing.event == "vanishes",
                )
            elif thing.event == "changes":
                assert thing.colour == before.colour_at(times[0]) and thing.new_colour == before.colour_at(times[-1])
            drawn[before.motion, thing.motion] += 1
        if scene.type == "order":
            assert begins == sorted(begins) and begins[0] > 0
    assert all(drawn[pair] for pair in (("left", "right"), ("left", "left"), ("up", None), ("growing", "shrinking")))


def test_each_question_has_its_answer_among_the_choices(scenes):
    answers = defaultdict(Counter)
    for index, scene in enumerate(scenes["train"] + scenes["test"]):
        rng = generator(0, "test", index, "questions")
        for item in questions(scene, rng):
            answers[item.family][item.canonical] += 1
            assert item.canonical in item.options and set(item.options) <= set(CHOICES[item.family])
            assert item.short == (item.answer == item.canonical)
            assert item.short == ("full sentence" not in item.question) or item.family == "match"
        turns = conversation(scene, rng, SIGHT_FAMILIES, 4)
        assert len(turns) == len(set(turns)) <= 4 and not {item.family for item in turns} & set(SOUND_FAMILIES)
    assert set(answers) == set(FAMILIES)
    for family in set(FAMILIES) - {"event"}:  # of which the new colours are many and rare
        assert set(answers[family]) == set(CHOICES[family])
    for family in ("see", "hear_presence"):
        assert answers[family]["Yes."] / answers[family].total() == pytest.approx(0.5, abs=0.05)


def test_questions_about_each_thing_and_about_its_colour(scenes):
    for index, scene in enumerate(scenes["train"]):
        rng = generator(0, "train", index, "each")
        named = [(item.question, item.canonical) for item in names(scene, rng)]
        asked = {(thing.colour, thing.kind) for thing in scene.objects if thing.event != "changes"}
        assert asked == {(c, k) for c, k in asked for question, answer in named if c in question and k in answer}
        assert len(named) == len(asked)
        moving = {thing.kind for thing in scene.objects if thing.motion}
        items = motions(scene, rng)
        assert {kind for kind in KINDS for item in items if f" {kind} " in item.question.replace("?", " ")} == moving
        assert len(items) == len(moving)
        of_kinds = {kind for kind in KINDS for item in colours(scene, rng) if f" {kind}" in item.question}
        assert of_kinds == set(scene.kinds)
        answers = {item.canonical: item.question for item in colour_presence(scene, rng)}
        assert set(answers) == ({"Yes.", "No."} if asked else set())
        for answer, question in answers.items():
            assert (answer == "Yes.") == any(f" {colour} {kind}" in question for colour, kind in asked)


def test_caption_says_what_is_seen_and_never_what_is_heard(scenes):
    for index, scene in enumerate(scenes["train"]):
        words = caption(scene, generator(0, "train", index, "caption")).replace(",", "").split()
        assert [word for word in words if word in KINDS] == list(scene.kinds)
        assert set(words) >= {thing.colour for thing in scene.objects}
        assert len(words) <= 24


@pytest.mark.parametrize("answer", ["A bell.", "a bell", "  The Bell!", "bell"])
def test_answers_are_compared_by_their_words(answer):
    assert normalise(answer) == "bell" != normalise("A bee.")


def _patch(kind: str, colour: str, pixels: int, background: np.ndarray | float) -> np.ndarray:
    """A kind as the model sees a small one, 14 pixels wide, painted `pixels` wide: (14, 14, 3)."""
    colours, rest = sprite(kind, colour, pixels)
    picture = Image.fromarray(np.clip(colours + background * rest, 0, 255).astype(np.uint8))
    return np.asarray(picture.resize((14, 14), Image.Resampling.BOX)).astype(float)


def test_kinds_are_told_apart_at_the_size_at_which_the_model_sees_them():
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        references = {kind: _patch(kind, colour, 28, 45.0) for kind in KINDS}
        for kind in KINDS:
            for pixels in (25, 29, 45):
                seen = _patch(kind, colour, pixels, rng.uniform(15, 85, 3) + rng.normal(0, 6, (pixels, pixels, 3)))
                assert min(KINDS, key=lambda other: np.abs(seen - references[other]).mean()) == kind


def _spectrum(kind: str, seed: int) -> np.ndarray:
    """What a sound is like: the mean and the spread over time of its level in 24 bands."""
    wave = kind_sound(kind, np.random.default_rng(seed))
    pieces = np.abs(np.fft.rfft(wave.reshape(-1, 500) * np.hanning(500), axis=1))
    bands = np.stack([part.mean(1) for part in np.array_split(pieces[:, 1:], 24, axis=1)], axis=1)
    levels = np.log(bands / bands.max() + 1e-3)
    return np.concatenate([levels.mean(0), levels.std(0)])


def test_sounds_of_a_kind_are_alike_and_unlike_all_others():
    references = {kind: np.mean([_spectrum(kind, seed) for seed in range(4)], axis=0) for kind in KINDS}
    for kind in KINDS:
        for seed in range(10, 18):
            found = _spectrum(kind, seed)
            assert min(KINDS, key=lambda other: np.linalg.norm(found - references[other])) == kind


def test_sound_is_heard_at_its_moment(scenes):
    for index, scene in enumerate(scenes["train"][:60]):
        wave = make_sound(scene, generator(3, "train", index, "sound"))
        if not scene.audio_track:
            assert wave is None and scene.sound is None
            continue
        assert wave.shape == (1, NUM_SAMPLES) and wave.dtype == np.float32 and np.abs(wave).max() <= 1
        if scene.sound and scene.noise < 0.005:
            halves = [np.abs(half).max() > 0.1 for half in np.split(wave[0], 2)]
            assert halves == [scene.moment != "end", scene.moment != "start"]


def test_pictures_show_the_scene(scenes):
    scene = next(scene for scene in scenes["train"] if scene.type == "motion" and scene.objects[0].motion == "left")
    frames = draw(scene, np.random.default_rng(0)).astype(int)
    empty = draw(Scene("empty", (), None, None, True, 0.0), np.random.default_rng(0)).astype(int)
    assert frames.shape == (NUM_FRAMES, VIEW, VIEW, 3)
    columns = [np.nonzero(np.abs(a - b).max(axis=(0, 2)) > 60)[0].mean() for a, b in zip(frames, empty, strict=True)]
    assert columns[0] - columns[-1] > 0.3 * VIEW * (NUM_FRAMES - 1) / NUM_FRAMES


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_command_writes_what_the_decoder_and_the_trainer_read(tmp_path):
    count = 24
    make_data.main([str(tmp_path), "--split", "train", "--clips", str(count), "--seed", "7", "--processes", "1"])
    scenes = make_data.read_scenes(tmp_path, "train")
    assert scenes == make_data.sample_scenes("train", count, 7)
    for index, scene in enumerate(scenes[:6]):
        path = tmp_path / make_data.clip_name("train", index)
        frames, metadata = read_video(path, num_frames=len(SAMPLED_TIMES), size=(VIEW, VIEW))
        assert [i / metadata.fps for i in metadata.frames_indices] == list(SAMPLED_TIMES)
        pictures = draw(scene, generator(7, "train", index, "picture"))[metadata.frames_indices]
        assert np.mean(np.abs(frames.permute(0, 2, 3, 1).numpy().astype(int) - pictures)) < 6
        wave = make_sound(scene, generator(7, "train", index, "sound"))
        decoded = read_audio(path)
        assert (decoded is None) == (wave is None)
        if decoded is not None:
            samples, rate = decoded
            assert rate == SAMPLING_RATE and samples.shape[0] == 1 and abs(samples.shape[1] - NUM_SAMPLES) <= 1024
            error = samples[0, :NUM_SAMPLES] - wave[0, : samples.shape[1]]
            assert np.sqrt(np.mean(error**2)) < 0.02
    for name in make_data.ANNOTATIONS:
        rows = _lines(tmp_path / f"train-{name}.jsonl")
        assert rows
        for row in rows:
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            items = [item for message in row["messages"] for item in message["content"]]
            media = [item for item in items if item["type"] != "text"]
            assert all((tmp_path / item["path"]).is_file() for item in media)
            assert media and ("audio" in {item["type"] for item in media}) == name.startswith("audio")
            assert all(item["text"] for item in items if item["type"] == "text")


def test_command_goes_on_where_it_stopped_and_refuses_another_seed(tmp_path):
    options = ["--split", "test", "--processes", "1"]
    make_data.main([str(tmp_path), "--clips", "1", *options])  # too few for any pair of clips
    make_data.main([str(tmp_path), "--clips", "3", *options])
    clips = sorted((tmp_path / "clips").iterdir())
    before = {clip: clip.read_bytes() for clip in clips}
    clips[1].unlink()
    kept = clips[0].stat().st_mtime_ns
    make_data.main([str(tmp_path), "--clips", "4", *options])
    assert {clip: clip.read_bytes() for clip in clips} == before and clips[0].stat().st_mtime_ns == kept
    assert len(list((tmp_path / "clips").iterdir())) == 4 == len(_lines(tmp_path / "test-scenes.jsonl"))
    with pytest.raises(SystemExit, match="another seed"):
        make_data.main([str(tmp_path), "--clips", "4", "--seed", "1", *options])


def test_frames_stand_for_sounds(scenes):
    train = scenes["train"]
    for scene in train:
        standing = make_data.stand_in(scene)
        if standing and standing[0]:
            seen = [scene.objects[0].visible(time) for time in SAMPLED_TIMES]
            assert scene.kinds == (standing[0],)
            assert standing[1] == ("throughout" if all(seen) else "end" if seen[-1] else "start")
    matches = Counter()
    for name, row in make_data.audio_annotations(train, "train", 3):
        (sounding, *shown) = [item for item in row["messages"][0]["content"] if item["type"] != "text"]
        heard = train[int(sounding["path"][-10:-4])]
        assert make_data.stand_in(heard) is not None
        if name == "audio-conversations" and shown and heard.objects:
            scene = train[int(shown[0]["path"][-10:-4])]
            assert all(HELD_OUT_SOUNDS[kind] != heard.kinds[0] for kind in scene.kinds)
            matches[heard.kinds[0] in scene.kinds] += bool(scene.objects)
    assert matches[True] / matches.total() == pytest.approx(0.5, abs=0.06)


def test_whether_the_sound_belongs_is_asked_before_yes_or_no_gives_it_away(scenes):
    train = scenes["train"]
    places, answers = Counter(), Counter()
    for name, row in make_data.audio_annotations(train, "train", 3):
        (sounding, *shown) = [item for item in row["messages"][0]["content"] if item["type"] != "text"]
        if name != "audio-conversations" or not shown:
            continue
        said = [message["content"][0]["text"] for message in row["messages"][1::2]]
        for place, answer in enumerate(said):
            if answer.startswith("I hear") and ": " in answer:
                (heard,) = train[int(sounding["path"][-10:-4])].kinds
                belongs = heard in train[int(shown[0]["path"][-10:-4])].kinds
                assert answer.endswith("see it: yes." if belongs else "see none: no.") and heard in answer
                assert not any(earlier.startswith(("Yes", "No")) for earlier in said[:place] if earlier != "Nothing.")
                places[place] += 1
                answers[belongs] += 1
    assert answers[True] / answers.total() == pytest.approx(0.5, abs=0.06)
    assert places[0] / places.total() == pytest.approx(0.4, abs=0.06)


def test_eye_and_ear_differ_as_often_as_they_agree(scenes):
    """Else "is there a ..." could be answered by ear, and "do you hear ..." by eye."""
    train = scenes["train"]
    answers = Counter()
    for name, row in make_data.audio_annotations(train, "train", 3):
        (sounding, *shown) = [item for item in row["messages"][0]["content"] if item["type"] != "text"]
        if name != "audio-conversations" or not shown:
            continue
        heard = train[int(sounding["path"][-10:-4])].kinds
        seen = train[int(shown[0]["path"][-10:-4])].kinds
        for user, _ in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            words = user["content"][-1]["text"].replace("?", "").split()
            for kind in set(KINDS) & set(words):
                if {"hear", "sound"} & set(words):
                    answers["hear", kind in heard] += kind in seen
                elif words[:2] in (["Is", "there"], ["Do", "you"]) and not set(COLOURS) & set(words):
                    answers["see", kind in seen] += kind in heard
    for sense in ("hear", "see"):
        share = answers[sense, True] / (answers[sense, True] + answers[sense, False])
        assert share == pytest.approx(0.5, abs=0.15), (sense, share)
