"""Reading and writing files of weights one tensor at a time, so that models larger than the memory can be converted.

Used by `convert_video_llama_checkpoint.py`. A `WeightFile` is one file to read, memory-mapped: a tensor is read from
the disk when it is asked for. `write_shard` writes a `.safetensors` file tensor by tensor, without holding it in
memory.
"""

import json
import logging
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

# The pages of mapped files that were read count as the process's memory until the files are closed, so after this many
# bytes all are closed, to be opened again when they are next read.
MAPPED_BYTES = 256 * 2**20

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

# What the published training code saves beside the weights, under "model".
TRAINING_STATE = ("optimizer", "config", "scaler", "epoch")


class ConversionError(Exception):
    """A mistake of the user's or a fault of a file, told in words for the person at the terminal."""


class WeightFile:
    """
    One file of named tensors, read lazily.

    Args:
        path (`Path`): A `.safetensors` file, or a PyTorch file of `{name: tensor}` or `{"model": {name: tensor}, …}`.

    Attributes:
        shapes (`dict[str, tuple[int, ...]]`): The shape of every tensor.
        dtypes (`dict[str, torch.dtype]`): The dtype of every tensor.
        training_config (`dict`): The configuration that the published training code saved with the weights, or `{}`.

    Raises:
        ConversionError: if there is no such file or it cannot be read safely.
    """

    _open_files: ClassVar[set["WeightFile"]] = set()
    _bytes_read: ClassVar[int] = 0

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.training_config: dict = {}
        self._mapped: Any = None  # a handle of safetensors, or the tensors of a PyTorch file, or None: not mapped
        if not path.is_file():
            raise ConversionError(f"There is no file {path}.")
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ConversionError(f"{path} is only a Git LFS pointer: fetch the file itself with `git lfs pull`.")
        mapped = self._map()
        if path.suffix == ".safetensors":
            for name in mapped.keys():  # noqa: SIM118  (a safetensors file is not iterable)
                tensor_slice = mapped.get_slice(name)
                self.shapes[name] = tuple(tensor_slice.get_shape())
                if tensor_slice.get_dtype() not in SAFETENSORS_DTYPES:
                    raise ConversionError(
                        f"{path}: {name} is quantised ({tensor_slice.get_dtype()}). Give the original."
                    )
                self.dtypes[name] = SAFETENSORS_DTYPES[tensor_slice.get_dtype()]
        else:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in mapped.items()}
            self.dtypes = {name: tensor.dtype for name, tensor in mapped.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name: a view of the mapped file, to be let go soon after use."""
        if WeightFile._bytes_read > MAPPED_BYTES:
            for file in WeightFile._open_files:
                file._mapped = None
            WeightFile._open_files.clear()
            WeightFile._bytes_read = 0
        mapped = self._map() if self._mapped is None else self._mapped
        tensor = mapped.get_tensor(name) if self.path.suffix == ".safetensors" else mapped[name]
        WeightFile._bytes_read += tensor.nbytes
        return tensor

    def _map(self) -> Any:
        if self.path.suffix == ".safetensors":
            try:
                self._mapped = safe_open(self.path, framework="pt")
            except SafetensorError as error:
                raise ConversionError(f"{self.path} is no whole safetensors file ({error}): get it again.") from error
            except RuntimeError as error:
                raise self._unmappable(error) from error
            WeightFile._open_files.add(self)
        else:
            mappable = zipfile.is_zipfile(self.path)
            self._mapped = self._load_pytorch_file(mappable)
            if mappable:  # else the tensors are in memory, and stay there
                WeightFile._open_files.add(self)
        return self._mapped

    def _load_pytorch_file(self, mappable: bool) -> dict[str, torch.Tensor]:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mappable)
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f"{self.path} cannot be read: it is cut short, is no PyTorch file, or holds Python objects other than "
                "tensors, which could run code and are therefore not loaded. Get the file again from its publisher."
            ) from error
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            if "mmap" in str(error):
                raise self._unmappable(error) from error
            raise ConversionError(
                f"{self.path} is no whole PyTorch file ({first_line(error)}): get it again."
            ) from error
        if not isinstance(content, dict):
            raise ConversionError(f"{self.path} holds a {type(content).__name__}, where named tensors were expected.")
        if not mappable:
            logger.warning("%s is in PyTorch's old format, which is read into memory as a whole.", self.path)
        if isinstance(content.get("model"), dict):
            if isinstance(content.get("config"), dict):
                self.training_config = content["config"]
            content = content["model"]
        strays = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
        strays = [name for name in strays if name not in TRAINING_STATE]
        if strays:
            raise ConversionError(f"{self.path} holds other things than tensors: {', '.join(map(str, strays[:5]))}.")
        return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}

    def _unmappable(self, error: RuntimeError) -> ConversionError:
        return ConversionError(
            f"{self.path} cannot be mapped ({first_line(error)}). By default Linux refuses that for files larger "
            "than the machine's memory and swap together: give the weights in smaller shards, or set "
            "vm.overcommit_memory to 1."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a JSON {type(content).__name__}, where an object was expected.")
    return content


def open_weight_files(path: Path) -> list[WeightFile]:
    """
    The files of weights at a path: the file itself or, of a folder, its shards (safetensors before PyTorch's).

    Raises:
        ConversionError: if there is nothing there, or a shard that the folder's index lists is missing.
    """
    if not path.is_dir():
        return [WeightFile(path)]
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            lost = [name for name in names if not (path / name).is_file()]
            if lost:
                raise ConversionError(f"{path} is incomplete: {index.name} lists {', '.join(lost)}, not found there.")
            return [WeightFile(path / name) for name in names]
        if (path / stem).is_file():
            return [WeightFile(path / stem)]
    for suffix in (".safetensors", ".bin", ".pth", ".pt"):
        shards = sorted(path.glob(f"*{suffix}"))
        if shards:
            return [WeightFile(shard) for shard in shards]
    return []


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(_bytes(tensor))


def write_shard(
    path: Path,
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], torch.Tensor],
) -> Iterable[tuple[str, int, int]]:
    """
    Writes one `.safetensors` file under a temporary name, tensor by tensor, and gives it its name when it is complete.

    Args:
        path (`Path`): The file to write.
        specs (`dict[str, tuple[tuple[int, ...], torch.dtype]]`): Shape and dtype of every tensor of the file.
        read (`Callable[[str], torch.Tensor]`): Gives the tensor of a name, in that shape and dtype.

    Yields:
        `tuple[str, int, int]`: a tensor's name, its size in bytes and its CRC-32, each when it has been written.
    """
    # The widest dtype first: every tensor then begins at a multiple of its item size, which readers rely on.
    names = sorted(specs, key=lambda name: (-specs[name][1].itemsize, name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = specs[name]
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            tensor = read(name)
            if (tuple(tensor.shape), tensor.dtype) != specs[name]:
                raise ValueError(f"{name}: announced {specs[name]}, got {tuple(tensor.shape)}, {tensor.dtype}.")
            data = _bytes(tensor)
            file.write(data)
            yield name, len(data), zlib.crc32(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
