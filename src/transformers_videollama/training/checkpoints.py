"""Checkpoints that are either complete or not there: how `trainer.VideoLlamaTrainer` writes, finds and deletes them.

A checkpoint is written into a hidden folder, `.checkpoint-12.partial`, and renamed to `checkpoint-12` once all of it
is on the disk. Its last file, `complete.json`, lists the others with their sizes and digests, so that one that was
damaged later is recognised as well. What a killed process leaves is a hidden folder, which the next start removes.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST_NAME = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(partial|deleted)")


def partial_folder(checkpoint: Path) -> Path:
    """The folder that a checkpoint is written into before it is renamed to `checkpoint`."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def start_checkpoint(checkpoint: Path) -> Path:
    """Makes the empty folder to write a checkpoint into, and returns it."""
    partial = partial_folder(checkpoint)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(checkpoint: Path) -> None:
    """
    Turns what was written into [`partial_folder`] into the checkpoint: everything is forced to the disk first, so that
    even after a power failure the folder of this name is complete. A damaged checkpoint of this name is replaced.
    """
    partial = partial_folder(checkpoint)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)} for path in files
    }
    (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for path in [*files, partial / MANIFEST_NAME, *folders, partial]:
        _force_to_disk(path)
    if checkpoint.exists():
        delete_checkpoint(checkpoint)
    partial.rename(checkpoint)
    _force_to_disk(checkpoint.parent)


def delete_checkpoint(checkpoint: Path) -> None:
    """Deletes a checkpoint. It loses its name first: a kill midway leaves no half of it under that name."""
    deleted = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(deleted, ignore_errors=True)
    checkpoint.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders named `checkpoint-N`, by ascending N."""
    if not output_dir.is_dir():
        return []
    numbered = [(_CHECKPOINT.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def find_last_checkpoint(output_dir: Path) -> Path | None:
    """
    The newest complete checkpoint of a folder, or `None` if there is none. Damaged ones are passed over with a warning
    that says what is wrong with them.
    """
    for checkpoint in reversed(list_checkpoints(output_dir)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning(f"{checkpoint} is passed over, because it is not a complete checkpoint: {damage}.")
    return None


def set_aside_later_checkpoints(output_dir: Path, checkpoint: Path) -> None:
    """
    Renames those that come after a checkpoint to go on from, if it is one of this folder: what is trained from here on
    is newer than they are, and the last one is found by its number.
    """
    checkpoints = list_checkpoints(output_dir)
    if checkpoint.resolve() not in [path.resolve() for path in checkpoints]:
        return
    for path in reversed(checkpoints):
        if path.resolve() == checkpoint.resolve():
            return
        names = (
            path.with_name(f"abandoned-{path.name}{f'-{number}' if number else ''}") for number in itertools.count()
        )
        name = next(name for name in names if not name.exists())
        path.rename(name)
        logger.warning(f"{path} is now {name.name}, because the training goes on from {checkpoint.name}.")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or `None` if it holds exactly what was written."""
    path = checkpoint / MANIFEST_NAME
    if not path.is_file():
        return f"{MANIFEST_NAME} is missing"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, (size, digest) in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _digest(file) != digest:
            return f"{name} was changed after it was written"
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Removes what killed processes left: checkpoints half written or half deleted. Only one process may do so."""
    if not output_dir.is_dir():
        return
    for path in output_dir.iterdir():
        if path.is_dir() and _LEFTOVER.fullmatch(path.name):
            logger.warning(f"{path} is removed: it was left half written or half deleted by a run that was killed.")
            shutil.rmtree(path)


def rotate_checkpoints(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """
    Deletes the checkpoints written longest ago until `limit` are left.

    Args:
        output_dir (`Path`): Their folder.
        limit (`int`, *optional*): How many may stay; all of them if `None` or 0.
        keep (`set[Path]`): Those that stay in any case.
    """
    if not limit or limit < 0:
        return
    # By time, as after resuming from an older checkpoint those with higher numbers are the outdated ones
    checkpoints = sorted(list_checkpoints(output_dir), key=lambda path: path.stat().st_mtime_ns)
    for checkpoint in [path for path in checkpoints if path not in keep][: max(len(checkpoints) - limit, 0)]:
        logger.info(f"{checkpoint} is deleted, because save_total_limit is {limit}.")
        delete_checkpoint(checkpoint)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _force_to_disk(path: Path) -> None:
    """`fsync` of a file or, on systems where folders can be opened, of a folder's list of names."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
