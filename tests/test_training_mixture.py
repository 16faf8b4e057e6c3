"""Mixed data sets: ratios, determinism whatever the workers, bad samples, streams that are split and resumed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import cut, write_media
from PIL import Image
from test_processing import make_processor
from torch.utils.data import DataLoader

from transformers_videollama.training.annotations import AnnotationError
from transformers_videollama.training.collator import VideoLlamaDataCollator
from transformers_videollama.training.mixture import (
    Source,
    TooManyBadSamplesError,
    TrainDataset,
    TrainIterableDataset,
    mix_sources,
)
from transformers_videollama.training.samples import SampleBuilder, SampleError


def write_rows(path: Path, name: str, number: int) -> Path:
    lines = ({"messages": [{"role": "user", "content": f"{name}{i}"}, {"role": "assistant", "content": "so"}]} for i in range(number))  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    """Rows a0 to a39 and b0 to b9."""
    return [Source("chat", str(write_rows(tmp_path / f"{name}.jsonl", name, n))) for name, n in (("a", 40), ("b", 10))]


class NameBuilder:
    """Gives the words of a row and a random number, and fails for the `bad` ones."""

    def __init__(self, bad: str = "", error: Exception | None = None):
        self.bad = bad.split()
        self.error = error

    def __call__(self, row, generator):
        name = row["messages"][0]["content"][0]["text"]
        draw = torch.rand((), generator=generator).item()
        if name in self.bad or self.bad == ["all"]:
            raise self.error or SampleError(f"{row['source']}: {name}.mp4 is broken.", f"{name}.mp4")
        return {"name": name, "draw": draw}


def keep(samples: list) -> list:
    return samples


def load(dataset, num_workers: int, batch_size: int = 2, **kwargs) -> list:
    return list(DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=keep, **kwargs))


def pairs(samples) -> list[tuple[str, float]]:
    return [(sample["name"], sample["draw"]) for sample in samples]


# ---------------------------------------------------------------------------------------------------------------------
# Mixing


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_ratios(tmp_path, streaming):
    for name, number in (("a", 3000), ("b", 100)):
        write_rows(tmp_path / f"{name}.jsonl", name, number)
    weighted = [
        Source("chat", str(tmp_path / "a.jsonl"), weight=100),
        Source("chat", str(tmp_path / "b.jsonl"), weight=24),
    ]
    names = [row["messages"][0]["content"][0]["text"] for row in mix_sources(weighted, 1, streaming)]
    share = sum(name[0] == "b" for name in names) / len(names)
    assert abs(share - 24 / 124) < 0.02
    assert len(set(names)) == 3100  # nothing is left out
    assert abs(sum(name[0] == "b" for name in names[:1000]) / 1000 - 24 / 124) < 0.05  # from the start


@pytest.mark.parametrize("streaming", [False, True])
def test_without_weights_all_rows_come_once(sources, streaming):
    names = [row["messages"][0]["content"][0]["text"] for row in mix_sources(sources, streaming=streaming)]
    assert names == [f"a{i}" for i in range(40)] + [f"b{i}" for i in range(10)]


@pytest.mark.parametrize("weights", [(1, None), (0, 1), (-1, 1), (float("nan"), 1)])
def test_wrong_weights_are_refused(sources, weights):
    for source, weight in zip(sources, weights, strict=True):
        source.weight = weight
    with pytest.raises(ValueError, match="weights above 0"):
        mix_sources(sources)
    with pytest.raises(ValueError, match="at least one source"):
        mix_sources([])


# ---------------------------------------------------------------------------------------------------------------------
# Map-style


def test_samples_do_not_depend_on_workers(sources):
    sources[0].weight, sources[1].weight = 2, 1
    dataset = TrainDataset(sources, NameBuilder(bad="a3 b5"), seed=4, max_bad_fraction=1)
    alone = pairs(dataset[i] for i in range(len(dataset)))
    assert len({draw for _, draw in alone}) == len(dataset)
    for num_workers in (0, 1, 3):
        assert pairs(sample for batch in load(dataset, num_workers) for sample in batch) == alone
    assert pairs([dataset[7]]) == [alone[7]] == pairs([dataset[7 - len(dataset)]])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_differ_and_reach_workers(sources, persistent):
    dataset = TrainDataset(sources, NameBuilder())
    loader = DataLoader(dataset, 2, num_workers=1, collate_fn=keep, persistent_workers=persistent)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(pairs(sample for batch in loader for sample in batch))
    assert epochs[0] == epochs[2]
    assert [name for name, _ in epochs[0]] == [name for name, _ in epochs[1]]
    assert not {draw for _, draw in epochs[0]} & {draw for _, draw in epochs[1]}
    assert pairs(TrainDataset(sources, NameBuilder(), seed=1)[i] for i in range(50)) != epochs[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_replaced_and_logged(sources, tmp_path, num_workers):
    log = tmp_path / "bad.jsonl"
    dataset = TrainDataset(sources, NameBuilder(bad="a3 b5"), max_bad_fraction=0.5, log_file=log)
    dataset.set_epoch(2)
    names = [sample["name"] for batch in load(dataset, num_workers) for sample in batch]
    assert len(names) == 50 and not {"a3", "b5"} & set(names)
    assert [name for i, name in enumerate(names) if i not in (3, 45)] == [f"a{i}" for i in range(40) if i != 3] + [
        f"b{i}" for i in range(10) if i != 5
    ]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(3, "a3.mp4", 2), (45, "b5.mp4", 2)} <= {(line["index"], line["path"], line["epoch"]) for line in lines}
    assert lines[0]["source"].endswith(("a.jsonl:4", "b.jsonl:6")) and "is broken" in lines[0]["error"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cls", [TrainDataset, TrainIterableDataset])
def test_too_many_bad_samples_stop_the_run(sources, tmp_path, num_workers, cls):
    log = tmp_path / "bad.jsonl"
    bad = " ".join(f"a{i}" for i in range(0, 40, 2))
    dataset = cls(sources, NameBuilder(bad), max_bad_fraction=0.2, log_file=log)
    with pytest.raises(TooManyBadSamplesError) as error:
        load(dataset, num_workers)
    assert "`max_bad_fraction` (20.0%)" in str(error.value) and str(log) in str(error.value)
    assert ".mp4 is broken" in str(error.value)
    assert len(log.read_text().splitlines()) < 20  # soon, and not at the end of the epoch


def test_share_of_bad_samples_is_that_of_all_workers(sources):
    """Each of ten workers sees five samples, too few to judge by themselves."""
    dataset = TrainDataset(sources[:1], NameBuilder("all"))
    with pytest.raises(TooManyBadSamplesError, match="of (2[0-9]) samples"):
        load(dataset, 5, batch_size=1)


def test_share_of_bad_samples_counts_what_replaced_them_and_all_epochs(sources):
    dataset = TrainDataset(sources, NameBuilder("a0"), max_bad_fraction=0.06)
    for index in range(1, 19):
        dataset[index]
    assert dataset[0]["name"] != "a0"
    dataset.set_epoch(1)
    with pytest.raises(TooManyBadSamplesError, match="^2 of 21 samples"):
        dataset[0]


def test_few_bad_samples_at_the_start_stop_nothing(sources):
    dataset = TrainDataset(sources, NameBuilder("a0 a1"), max_bad_fraction=0.1)
    assert len([dataset[i] for i in range(50)]) == 50


@pytest.mark.parametrize("cls", [TrainDataset, TrainIterableDataset])
def test_run_without_any_good_sample_ends(sources, cls):
    for max_bad_fraction in (0.5, 1.0):
        endless = {"repeat": True} if cls is TrainIterableDataset else {}
        with pytest.raises(TooManyBadSamplesError):
            list(cls(sources, NameBuilder("all"), max_bad_fraction=max_bad_fraction, **endless))
    with pytest.raises(ValueError, match="max_bad_fraction"):
        cls(sources, NameBuilder(), max_bad_fraction=3)


@pytest.mark.parametrize("cls", [TrainDataset, TrainIterableDataset])
@pytest.mark.parametrize("error", [TypeError("a"), KeyError("a"), ValueError("a"), RuntimeError("a")])
def test_errors_of_programs_are_not_hidden(sources, cls, error):
    with pytest.raises(type(error)):
        list(cls(sources, NameBuilder("a3", error)))


def test_errors_of_files_count_as_bad(sources):
    dataset = TrainDataset(sources, NameBuilder("a3", OSError("disk")))
    assert dataset[3]["name"] != "a3"


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.fixture
def shards(tmp_path) -> list[Source]:
    """a: four files of ten rows; b: one file of ten."""
    for shard in range(4):
        write_rows(tmp_path / f"a_{shard}.jsonl", f"a{shard}-", 10)
    write_rows(tmp_path / "b.jsonl", "b", 10)
    return [Source("chat", str(tmp_path / "a_*.jsonl"), weight=3), Source("chat", str(tmp_path / "b.jsonl"), weight=1)]


@pytest.mark.parametrize("num_sources", [1, 2])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 3), (2, 2), (3, 0)])
def test_processes_and_workers_share_a_stream(shards, num_sources, world_size, num_workers):
    """Together they read what one alone reads, nothing twice; and each sample is the same."""
    settings = {"sources": shards[:num_sources], "builder": NameBuilder(), "seed": 3}
    alone = Counter(pairs(TrainIterableDataset(**settings)))
    together: Counter = Counter()
    for rank in range(world_size):
        part = TrainIterableDataset(**settings, rank=rank, world_size=world_size)
        samples = pairs(sample for batch in load(part, num_workers) for sample in batch)
        assert len(samples) > sum(alone.values()) / world_size / 2
        together += Counter(samples)
    assert together == alone


def test_streams_are_shuffled_anew_in_each_epoch(shards):
    stream = TrainIterableDataset(shards[:1], NameBuilder())
    first = pairs(stream)
    stream.set_epoch(1)
    second = pairs(stream)
    assert [name for name, _ in first] != [name for name, _ in second]
    assert sorted(name for name, _ in first) == sorted(name for name, _ in second)
    stream.set_epoch(0)
    assert pairs(stream) == first


def take(dataset, num_workers: int, number: int) -> list:
    """Batches of three as the Trainer takes them: the data set learns of those that were used only."""
    batches = []
    loader = DataLoader(dataset, 3, num_workers=num_workers, collate_fn=keep)
    for _, batch in zip(range(number), loader, strict=False):
        dataset.update_position(batch[-1]["position"])
        batches.append(pairs(batch))
    return batches


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("stop", [1, 4, 17])
def test_resumed_stream_goes_on_exactly(shards, num_workers, stop):
    settings = {"sources": shards, "builder": NameBuilder("a0-1 b3"), "max_bad_fraction": 1, "repeat": True}
    uninterrupted = take(TrainIterableDataset(**settings), num_workers, 30)
    stream = TrainIterableDataset(**settings)
    assert stream.position() is None
    assert take(stream, num_workers, stop) == uninterrupted[:stop]
    position = json.loads(json.dumps(stream.position()))

    built = []
    resumed = TrainIterableDataset(**settings)
    resumed.load_position(position)
    resumed.set_epoch(0)  # as the Trainer does at its start
    if num_workers == 0:
        resumed._samples.builder = lambda row, generator: built.append(row) or NameBuilder("a0-1 b3")(row, generator)
    assert take(resumed, num_workers, 30 - stop) == uninterrupted[stop:]
    if num_workers == 0:
        assert len(built) < 3 * (30 - stop) * 1.5  # what was consumed is not built again

    twice = TrainIterableDataset(**settings)
    twice.load_position(position)
    take(twice, num_workers, 3)
    thrice = TrainIterableDataset(**settings)
    thrice.load_position(twice.position())
    assert take(thrice, num_workers, 30 - stop - 3) == uninterrupted[stop + 3 :]


def test_epoch_after_a_resumed_one_is_whole(shards):
    stream = TrainIterableDataset(shards, NameBuilder())
    take(stream, 2, 3)
    resumed = TrainIterableDataset(shards, NameBuilder())
    resumed.load_position(stream.position())
    resumed.set_epoch(1)
    fresh = TrainIterableDataset(shards, NameBuilder())
    fresh.set_epoch(1)
    assert resumed.position() is None
    assert take(resumed, 2, 100) == take(fresh, 2, 100)


def test_position_of_other_workers_or_processes_is_refused(shards):
    stream = TrainIterableDataset(shards, NameBuilder(), rank=1, world_size=2)
    take(stream, 2, 3)
    other = TrainIterableDataset(shards, NameBuilder(), rank=1, world_size=2)
    other.load_position(stream.position())
    for num_workers in (0, 3):
        with pytest.raises(ValueError, match="saved with 2 data loader workers"):
            load(other, num_workers)
    with pytest.raises(ValueError, match="process 1 of 2, this is process 0 of 1"):
        TrainIterableDataset(shards, NameBuilder()).load_position(stream.position())


def test_wrong_row_in_a_stream_stops_it_with_file_and_line(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", "a", 30)
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(AnnotationError, match="a.jsonl:31"):
        load(TrainIterableDataset([Source("chat", str(file))], NameBuilder()), 2)
    with pytest.raises(AnnotationError, match="a.jsonl:31"):
        TrainDataset([Source("chat", str(file))], NameBuilder())


# ---------------------------------------------------------------------------------------------------------------------
# With real media


def test_real_media_from_files_to_batches(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "image").mkdir()
    for number in range(6):
        write_media(tmp_path / "v" / f"{number}.mp4", num_frames=3 + number)
    cut(tmp_path / "v" / "2.mp4", 0.3)
    (tmp_path / "v" / "4.mp4").unlink()
    for number in range(3):
        Image.fromarray(np.full((20, 30, 3), 50 * number, np.uint8)).save(tmp_path / "image" / f"{number}.jpg")
    (tmp_path / "a.csv").write_text("videoid,name,page_dir\n" + "".join(f"{i},A video {i}.,v\n" for i in range(6)))
    (tmp_path / "cap.json").write_text(
        json.dumps({"annotations": [{"image_id": str(i), "caption": f"An image {i}."} for i in range(3)]})
    )
    sources = [
        Source("webvid", str(tmp_path / "a.csv"), weight=2),
        Source("llava_cc3m", str(tmp_path / "cap.json"), weight=1),
    ]
    processor = make_processor("plain")
    builder = SampleBuilder(processor, text_format="caption", num_frames=4)
    for cls in (TrainDataset, TrainIterableDataset):
        log = tmp_path / f"{cls.__name__}.jsonl"
        dataset = cls(sources, builder, max_bad_fraction=0.9, log_file=log)
        batches = [list(DataLoader(dataset, 4, num_workers=n, collate_fn=VideoLlamaDataCollator(0))) for n in (0, 2)]
        for batch in (batch for each in batches for batch in each):
            num_videos = len(batch.get("pixel_values_videos", ()))
            num_images = len(batch.get("pixel_values", ()))
            assert num_videos + num_images == len(batch["input_ids"])
            assert num_videos * 5 == (batch["input_ids"] == processor.video_token_id).sum()
            assert ("position" in batch) == (cls is TrainIterableDataset)
        if cls is TrainDataset:
            for one, other in zip(*batches, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)
        assert {Path(json.loads(line)["path"]).name for line in log.read_text().splitlines()} == {"2.mp4", "4.mp4"}
