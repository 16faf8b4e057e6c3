"""Training that is killed and resumed gives what it gives when left alone, to the last bit; checkpoints are whole or
absent."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import losses, make_model, make_trainer, start_process, train_to_the_end

from transformers_videollama.training.checkpoints import (
    MANIFEST_NAME,
    find_damage,
    find_last_checkpoint,
    finish_checkpoint,
    list_checkpoints,
    partial_folder,
    remove_leftovers,
    rotate_checkpoints,
    start_checkpoint,
)

WEIGHTS = "trained_part.safetensors"
TIME_LIMIT = 600.0  # seconds, after which something hangs


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    partial = start_checkpoint(checkpoint)
    (partial / WEIGHTS).write_bytes(bytes(range(100)))
    (partial / "trainer_state.json").write_text("{}")
    finish_checkpoint(checkpoint)
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Killed for real


def kill_when(process: Any, condition: Callable[[], bool]) -> bool:
    """
    Kills a process at a moment when `condition` holds, and says whether it did: not if the process ended before. The
    process is halted before the second look, so that it cannot have gone on between the look and the kill.
    """
    deadline = time.monotonic() + TIME_LIMIT
    while process.is_alive():
        assert time.monotonic() < deadline, "The training does not come to an end."
        if condition():
            os.kill(process.pid, signal.SIGSTOP)
            if condition():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                return True
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.0005)
    return False


def moments(folder: Path) -> dict[str, Callable[[], bool]]:
    """Moments of a run at which it is killed, each at the first save or step where it comes about."""

    def partial_has(name: str) -> bool:
        return any((path / name).exists() for path in folder.glob(".checkpoint-*.partial"))

    def step() -> int:
        path = folder / "step"
        text = path.read_text() if path.exists() else ""
        return int(text) if text else 0

    return {
        "before the first checkpoint": lambda: step() == 1,
        "when a save begins": lambda: any(folder.glob(".checkpoint-*.partial")),
        "between two checkpoints": lambda: step() == 5,
        "when the weights are written": lambda: partial_has(WEIGHTS),
        "when everything is written but the list of it": lambda: partial_has("trainer_state.json"),
        "when an old checkpoint is deleted": lambda: any(folder.glob(".checkpoint-*.deleted")),
    }


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], Path]:
    """Folder of a run that was never interrupted."""
    folders: dict[tuple[bool, int], Path] = {}

    def run(streaming: bool, num_workers: int) -> Path:
        if (streaming, num_workers) not in folders:
            folder = tmp_path_factory.mktemp("left_alone") / "run"
            process = start_process(train_to_the_end, folder, folder.parent / "data", streaming, num_workers)
            process.join(TIME_LIMIT)
            assert process.exitcode == 0
            folders[streaming, num_workers] = folder
        return folders[streaming, num_workers]

    return run


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_killed_and_resumed_runs_give_the_same_losses_and_weights(
    streaming: bool, num_workers: int, left_alone: Callable[[bool, int], Path], tmp_path: Path
) -> None:
    expected = left_alone(streaming, num_workers)
    folder = tmp_path / "run"
    killed = []
    for moment, condition in moments(folder).items():
        process = start_process(train_to_the_end, folder, expected.parent / "data", streaming, num_workers)
        if kill_when(process, condition):
            killed.append(moment)
        for checkpoint in list_checkpoints(folder):
            assert find_damage(checkpoint) is None
        if (folder / "losses.json").exists():
            break
    assert {"before the first checkpoint", "when a save begins", "between two checkpoints"} <= set(killed)
    process = start_process(train_to_the_end, folder, expected.parent / "data", streaming, num_workers)
    process.join(TIME_LIMIT)
    assert process.exitcode == 0
    found, wanted = (json.loads((run / "losses.json").read_text()) for run in (folder, expected))
    assert len(wanted) == 12
    assert found == wanted
    found, wanted = (load_file(run / WEIGHTS) for run in (folder, expected))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-10", "checkpoint-12"]


# ---------------------------------------------------------------------------------------------------------------------
# Complete or not there


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path) is None
    assert find_last_checkpoint(tmp_path / "absent") is None
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200.bak").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(
    "damage, reason",
    {
        "truncated": f"{WEIGHTS} has 50 bytes instead of 100",
        "changed": f"{WEIGHTS} was changed",
        "deleted": f"{WEIGHTS} is missing",
        "no list": f"{MANIFEST_NAME} is missing",
        "half a list": f"{MANIFEST_NAME} cannot be read",
        "a list of nothing": f"{MANIFEST_NAME} cannot be read",
    }.items(),
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    weights, manifest = bad / WEIGHTS, bad / MANIFEST_NAME
    if damage == "truncated":
        weights.write_bytes(bytes(50))
    elif damage == "changed":
        weights.write_bytes(bytes(100))
    elif damage == "deleted":
        weights.unlink()
    elif damage == "no list":
        manifest.unlink()
    elif damage == "half a list":
        manifest.write_text(manifest.read_text()[:20])
    else:
        manifest.write_text("[]")
    with caplog.at_level("WARNING"):
        assert find_last_checkpoint(tmp_path) == good
    assert f"{bad} is passed over" in caplog.text and reason in caplog.text


def test_a_half_written_checkpoint_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    partial = start_checkpoint(tmp_path / "checkpoint-3")
    assert partial == partial_folder(tmp_path / "checkpoint-3")
    (partial / WEIGHTS).write_bytes(bytes(10))
    mine = tmp_path / ".checkpoint-notes"
    mine.mkdir()
    assert list_checkpoints(tmp_path) == []
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert not partial.exists() and mine.exists()


def test_saving_again_replaces_a_damaged_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / WEIGHTS).unlink()
    write_checkpoint(tmp_path, 1)
    assert find_last_checkpoint(tmp_path) == checkpoint
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_rotation_deletes_what_was_written_longest_ago(tmp_path: Path) -> None:
    # As after damage to checkpoint 30, which was resumed from 10
    for age, step in enumerate([30, 10, 15, 20]):
        os.utime(write_checkpoint(tmp_path, step), (age, age))
    last = tmp_path / "checkpoint-20"
    rotate_checkpoints(tmp_path, None, {last})
    rotate_checkpoints(tmp_path, 0, {last})
    assert len(list_checkpoints(tmp_path)) == 4
    rotate_checkpoints(tmp_path, 2, {last})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-20"]
    rotate_checkpoints(tmp_path, 1, {tmp_path / "checkpoint-15", last})
    assert len(list_checkpoints(tmp_path)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_run_falls_back_to_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", data=tmp_path, **settings)
    whole.train()
    (tmp_path / "whole" / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "whole" / "checkpoint-4" / WEIGHTS).write_bytes(b"")
    resumed = make_trainer(tmp_path / "whole", data=tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for step in (2, 4, 6):
        assert find_damage(tmp_path / "whole" / f"checkpoint-{step}") is None


def test_going_on_from_an_older_checkpoint_leaves_the_newer_ones_behind(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "data": tmp_path}
    run = tmp_path / "run"
    make_trainer(run, max_steps=6, **settings).train()
    again = make_trainer(run, max_steps=4, **settings)
    again.train(resume_from_checkpoint=run / "checkpoint-2")
    assert find_last_checkpoint(run) == run / "checkpoint-4"
    assert find_damage(run / "abandoned-checkpoint-6") is None
    make_trainer(run, max_steps=6, **settings).train(resume_from_checkpoint="last")
    make_trainer(run, max_steps=6, **settings).train(resume_from_checkpoint=run / "checkpoint-4")
    assert {path.name for path in run.glob("abandoned-*")} == {
        "abandoned-checkpoint-4", "abandoned-checkpoint-6", "abandoned-checkpoint-6-1",
    }  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("max_steps", [7, 3])
def test_a_run_that_is_done_is_left_as_it_is(max_steps: int, streaming: bool, tmp_path: Path) -> None:
    settings = {"streaming": streaming, "save_strategy": "steps", "save_steps": 7, "data": tmp_path}
    run = tmp_path / "run"
    done = make_trainer(run, max_steps=7, **settings)  # of five steps an epoch
    done.train()
    done.save_model()
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = make_trainer(run, max_steps=max_steps, **settings)
    assert again.train(resume_from_checkpoint="last").global_step == 7
    again.save_model()
    assert losses(again) == losses(done) and len(losses(done)) == 7
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_samples_grouped_by_length_come_in_the_same_order_when_resumed(tmp_path: Path) -> None:
    settings = {
        "train_sampling_strategy": "group_by_length",
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 7,
    }
    whole = make_trainer(tmp_path / "whole", data=tmp_path, **settings)  # of five steps an epoch
    whole.train()
    resumed = make_trainer(tmp_path / "whole", data=tmp_path, **settings)
    torch.manual_seed(1)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-7")
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 9


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="there is no such folder"):
        trainer.train(resume_from_checkpoint=tmp_path / "absent")
    trainer.train()
    (tmp_path / "run" / "checkpoint-1" / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-1: trained_part\.safetensors has 0 bytes"):
        trainer.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
    model = make_model()
    model.set_trainable("audio")
    other = make_trainer(tmp_path / "run", model=model, max_steps=4)
    for checkpoint in ("last", tmp_path / "run" / "checkpoint-2"):
        with pytest.raises(ValueError, match="trained other parameters"):
            other.train(resume_from_checkpoint=checkpoint)


def test_a_refused_checkpoint_leaves_the_later_ones_in_their_places(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_trainer(run, max_steps=2, save_strategy="steps", save_steps=1).train()
    model = make_model()
    model.set_trainable("audio")
    with pytest.raises(ValueError, match="trained other parameters"):
        make_trainer(run, model=model).train(resume_from_checkpoint=run / "checkpoint-1")
    assert find_last_checkpoint(run) == run / "checkpoint-2"


def test_a_checkpoint_of_the_model_alone_is_not_resumed_from(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(tmp_path / "run", max_steps=2, **settings).train()
    with pytest.raises(ValueError, match=r"saved with `save_only_model`.*--trained_part .*checkpoint-2"):
        make_trainer(tmp_path / "run", max_steps=4, **settings).train(resume_from_checkpoint="last")


def test_a_stream_is_not_resumed_from_a_run_that_did_not_stream(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path / "run", streaming=True, max_steps=4)
    with pytest.raises(ValueError, match=r"has no data_position_0\.json.*ignore_data_skip"):
        trainer.train(resume_from_checkpoint="last")


def test_weights_are_loaded_without_running_code(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2).train()
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(tmp_path / "run" / "checkpoint-2" / name, weights_only=True)
