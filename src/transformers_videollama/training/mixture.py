"""Mixed data sets for the data loader: rows in their ratio, made into samples in its workers.

Between `annotations` (rows) and `collator` (batches); `samples` makes the samples. A sample depends on the seed, the
epoch and its row alone, never on the number of workers. Rows that cannot be read are replaced, counted and logged.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..media import MediaError
from .annotations import load_annotations
from .samples import SampleError

if TYPE_CHECKING:
    import datasets

    AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

MIN_SAMPLES_LOOKED_AT = 20
"""Before so many samples the share of bad ones says little, and does not stop a run."""

_MAX_ATTEMPTS = 100
_MAX_WORKERS = 256
_NUM_ERRORS_SHOWN = 3

Row = dict[str, Any]
Builder = Callable[[Row, torch.Generator], dict[str, Any]]


@dataclass
class Source:
    """
    One of the data sets of a mixture.

    Args:
        format (`str`): see [`load_annotations`].
        annotations (`str` or `list[str]`): its annotation files.
        media_root (`str`, *optional*): the folder of its media; by default that of the annotation file.
        weight (`float`, *optional*): its share of the mixture, relative to the other weights.
    """

    format: str
    annotations: str | list[str]
    media_root: str | None = None
    weight: float | None = None


class TooManyBadSamplesError(RuntimeError):
    """More samples than allowed cannot be read."""


def mix_sources(sources: Sequence[Source], seed: int = 0, streaming: bool = False) -> "AnyDataset":
    """
    Rows of all sources: drawn in proportion to their weights until each row of each source was there, or, without
    weights, all rows once, one source after the other.

    Args:
        sources: all with a weight or none.
        seed: of the order in which sources are drawn.
        streaming: read rows while they are used.

    Raises:
        AnnotationError, FileNotFoundError: see [`load_annotations`].
        ValueError: no source, or weights that are missing or not positive.
    """
    from datasets import concatenate_datasets, interleave_datasets

    weights = [source.weight for source in sources if source.weight is not None]
    if not sources or len(weights) not in (0, len(sources)) or any(not weight > 0 for weight in weights):
        raise ValueError(
            "A mixture needs at least one source, and weights above 0 for all of them or for none; got"
            f" {[source.weight for source in sources]}."
        )
    parts = [load_annotations(s.format, s.annotations, s.media_root, streaming) for s in sources]
    if not weights:
        return concatenate_datasets(parts)
    probabilities = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")


class _BadSamples:
    """Builds samples; logs those that cannot be built, and counts them over all workers of the process."""

    def __init__(self, builder: Builder, seed: int, max_bad_fraction: float, log_file: str | os.PathLike | None):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"`max_bad_fraction` is a share between 0 and 1, not {max_bad_fraction}.")
        self.builder = builder
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.log_file = None if log_file is None else os.path.abspath(log_file)
        # Looked at and bad, a row for each worker; workers see and write the same memory
        self.counts = torch.zeros(_MAX_WORKERS, 2, dtype=torch.int64).share_memory_()
        self.last_errors: list[str] = []

    def generator(self, epoch: int, key: int, attempt: int = 0) -> torch.Generator:
        """Of all random choices of a sample, which `key` tells from the others of its epoch."""
        entropy = np.random.SeedSequence([self.seed, epoch, key, attempt]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))

    def build(self, row: Row, generator: torch.Generator, index: int, epoch: int) -> dict[str, Any] | None:
        """The sample; None for a bad one. `index` is its place, for the log."""
        worker = get_worker_info()
        counts = self.counts[0 if worker is None else worker.id % _MAX_WORKERS]
        counts[0] += 1
        try:
            return self.builder(row, generator)
        except (SampleError, MediaError, OSError) as error:
            counts[1] += 1
            self._log(row, error, index, epoch)
            self._check()
            return None

    def _log(self, row: Row, error: Exception, index: int, epoch: int) -> None:
        self.last_errors = [*self.last_errors, str(error)][-_NUM_ERRORS_SHOWN:]
        if self.log_file is None:
            return
        paths = [entry["path"] for message in row["messages"] for entry in message["content"] if entry["path"]]
        path = getattr(error, "path", None) or next(iter(paths), None)
        line = {"source": row["source"], "path": path, "error": str(error), "index": index, "epoch": epoch}
        # One write of one line at the end of the file: lines of several processes do not mix
        file = os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)

    def _check(self) -> None:
        looked_at, bad = self.counts.sum(0).tolist()
        if looked_at >= MIN_SAMPLES_LOOKED_AT and bad > self.max_bad_fraction * looked_at:
            raise self.error(
                f"{bad} of {looked_at} samples ({bad / looked_at:.1%}) cannot be read, more than `max_bad_fraction`"
                f" ({self.max_bad_fraction:.1%}) allows"
            )

    def error(self, reason: str) -> TooManyBadSamplesError:
        log = "" if self.log_file is None else f" All of them are in {self.log_file}."
        errors = "\n".join(f"- {error}" for error in self.last_errors)
        return TooManyBadSamplesError(f"{reason}.{log} The last errors:\n{errors}")


class _Mixture:
    """What both data sets have: the rows of a mixture, what makes samples of them, and the epoch."""

    _streaming = False

    def __init__(
        self,
        sources: Sequence[Source],
        builder: Builder,
        seed: int = 0,
        max_bad_fraction: float = 0.1,
        log_file: str | os.PathLike | None = None,
    ):
        self.rows: Any = mix_sources(sources, seed, self._streaming)
        self._samples = _BadSamples(builder, seed, max_bad_fraction, log_file)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose crops and frames are drawn."""
        self._epoch.fill_(epoch)


class TrainDataset(_Mixture, Dataset):
    """
    A mixture as a map-style data set: item `i` of an epoch is the same sample whatever is loaded before or beside it.
    A bad sample is replaced by one drawn at random.

    Args:
        sources (`Sequence[Source]`): see [`mix_sources`].
        builder ([`SampleBuilder`]): makes samples of rows.
        seed (`int`, defaults to 0): of the mixture and of all samples.
        max_bad_fraction (`float`, defaults to 0.1):
            the run stops when a larger share of the rows that were tried cannot be read, at the earliest after
            [`MIN_SAMPLES_LOOKED_AT`]. Every process of a distributed run counts for itself, with all of its workers
            and epochs, from its start on; rows in the place of bad ones count as well. The first process past the
            share stops the run.
        log_file (`str`, *optional*): gets a JSON line `{"source", "path", "error", "index", "epoch"}` for each bad
            sample; several processes may share it.
    """

    def __len__(self) -> int:
        return len(self.rows)

    def text_lengths(self) -> list[int]:
        """Of each row the characters of its messages, about in proportion to its tokens; no media are read."""
        return [
            sum(len(entry["text"] or "") for message in messages for entry in message["content"])
            for messages in self.rows["messages"]
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample; raises [`TooManyBadSamplesError`] as described above."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} samples; number {index} was asked for.")
        index = int(index) % len(self)

        epoch = int(self._epoch)
        row_index = index
        for attempt in range(_MAX_ATTEMPTS):
            generator = self._samples.generator(epoch, index, attempt)
            if attempt:
                row_index = int(torch.randint(len(self), (), generator=generator))
            sample = self._samples.build(self.rows[row_index], generator, index, epoch)
            if sample is not None:
                return sample
        raise self._samples.error(f"{_MAX_ATTEMPTS} samples in a row cannot be read")


class TrainIterableDataset(_Mixture, IterableDataset):
    """
    A mixture as a stream, of which no more is in memory than is shuffled.

    Every worker of every process reads a part of its own. Sources without weights come one after the other, and are
    only mixed by the shuffling of near rows. A bad sample is replaced by the next one. An item has `position`, int64
    (4,): the worker, the number of workers, the epoch and how many rows this worker has consumed in it. Give the
    positions of batches, in the order in which they are trained on, to `update_position`; what `position` then returns
    lets `load_position` go on from there exactly, in a new process, without opening the media before it.

    Args:
        sources, builder, seed, max_bad_fraction, log_file: as of [`TrainDataset`].
        rank (`int`, defaults to 0), world_size (`int`, defaults to 1): which of how many processes this is.
        shuffle_buffer_size (`int`, defaults to 1000): how many rows (not samples) are shuffled at a time.
        repeat (`bool`, defaults to `False`): go on with the next epoch at the end of one, without end. Processes of a
            distributed run have parts of different lengths, so only then none waits for another that has ended.
    """

    _streaming = True

    def __init__(
        self,
        sources: Sequence[Source],
        builder: Builder,
        seed: int = 0,
        max_bad_fraction: float = 0.1,
        log_file: str | os.PathLike | None = None,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer_size: int = 1000,
        repeat: bool = False,
    ):
        super().__init__(sources, builder, seed, max_bad_fraction, log_file)
        self.rows = self.rows.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
        self.rank = rank
        self.world_size = world_size
        self.repeat = repeat
        self._start: dict[str, Any] | None = None
        self._position: dict[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) to start with; a loaded position of that epoch or a later one remains."""
        super().set_epoch(epoch)
        if not _reaches(self._position, epoch):
            self._position = None

    def update_position(self, position: torch.Tensor) -> None:
        """Note the `position` of a batch that has been trained on."""
        worker, num_workers, epoch, consumed = position.tolist()
        workers = {} if self._position is None else self._position["workers"]
        self._position = {
            "rank": self.rank,
            "world_size": self.world_size,
            "num_workers": num_workers,
            "next_worker": (worker + 1) % num_workers,
            "workers": {**workers, str(worker): {"epoch": epoch, "consumed": consumed}},
        }

    def position(self) -> dict[str, Any] | None:
        """Where this process is in the stream, to be saved as JSON; None at the start."""
        return self._position

    def load_position(self, position: dict[str, Any] | None) -> None:
        """
        Go on from a saved position when iterated next.

        Raises:
            ValueError: it was saved by another process, or among another number of them.
        """
        if position is not None and (position["rank"], position["world_size"]) != (self.rank, self.world_size):
            raise ValueError(
                f"The position in the data was saved by process {position['rank']} of {position['world_size']}, this "
                f"is process {self.rank} of {self.world_size}. Resume with as many processes, or start anew."
            )
        self._start = self._position = position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        The samples; raises [`TooManyBadSamplesError`], and `ValueError` for another number of workers than saved.
        """
        info = get_worker_info()
        number, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, consumed = int(self._epoch), 0
        if self._start is not None and _reaches(self._start, epoch):
            if self._start["num_workers"] != num_workers:
                raise ValueError(
                    f"The position in the data was saved with {self._start['num_workers']} data loader workers (0 "
                    f"count as 1), now there are {num_workers}. Resume with the same `dataloader_num_workers`."
                )
            # The data loader begins with its worker 0, whoever's turn it was
            number = (number + self._start["next_worker"]) % num_workers
            start = self._start["workers"].get(str(number), {"epoch": epoch, "consumed": 0})
            epoch, consumed = start["epoch"], start["consumed"]
        while True:
            index, is_readable = -1, consumed > 0  # of what came before a position something was
            for index, row in enumerate(self._rows_of(number, num_workers, epoch)):
                if index < consumed:
                    continue
                # The name of its place, which is the same whoever reads it
                key = int.from_bytes(hashlib.blake2b(row["source"].encode(), digest_size=8).digest(), "big")
                sample = self._samples.build(row, self._samples.generator(epoch, key), index, epoch)
                if sample is not None:  # else the next row takes its place
                    is_readable = True
                    sample["position"] = torch.tensor([number, num_workers, epoch, index + 1])
                    yield sample
            if index >= 0 and not is_readable:
                raise self._samples.error(f"None of the {index + 1} samples of an epoch can be read")
            if not self.repeat or index < 0:
                return
            epoch, consumed = epoch + 1, 0

    def _rows_of(self, worker: int, num_workers: int, epoch: int) -> Iterator[Row]:
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(
            self.rows, rank=self.rank * num_workers + worker, world_size=self.world_size * num_workers
        )
        rows.set_epoch(epoch)
        # In batches, because single rows would be split among the workers once more
        for batch in rows.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}


def _reaches(position: dict[str, Any] | None, epoch: int) -> bool:
    """Whether a position of [`TrainIterableDataset`] is of this epoch or a later one."""
    return position is not None and any(start["epoch"] >= epoch for start in position["workers"].values())
