"""Two processes train as one does: DDP, FSDP2 and, where it is installed, DeepSpeed on CPUs, with the shipped
`accelerate` configurations and the real script."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from distributed_runs import NUM_STREAMED
from media_files import write_media
from PIL import Image
from safetensors.torch import load_file
from training_runs import eval_losses, losses

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.training.run import main

CONFIGURATIONS = Path(__file__).parents[1] / "examples" / "training" / "accelerate"
NUM_CLIPS = 2 * NUM_STREAMED
NUM_STEPS = 5  # of which the last two are of a second epoch
SAVED_STEP = 2

Run = tuple[Path, list[float]]  # its folder and its losses
Runs = tuple[str, Path, dict[str, list[dict[str, Any]]]]  # see `two_processes`


@pytest.fixture(scope="module")
def model_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without dropout, whose masks depend on how a batch is divided."""
    folder = tmp_path_factory.mktemp("model")
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder)
    for part in (model.config.video_qformer_config, model.config.audio_qformer_config):
        part.hidden_dropout_prob = part.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    VideoLlamaProcessor.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with captions of one to five words, so that processes have different numbers of labels."""
    folder = tmp_path_factory.mktemp("data")
    rows = ["videoid,name,page_dir"]
    for number in range(NUM_CLIPS):
        write_media(folder / f"{number}.mp4", num_frames=4 + number % 3)
        rows.append(f"{number},{' '.join([str(number)] * (1 + number % 5))},.")
    (folder / "webvid.csv").write_text("\n".join(rows) + "\n")
    Image.new("RGB", (32, 24), "red").save(folder / "red.png")
    media = [[], ["video"], ["image"], ["image", "video", "image"]]
    lines = []
    for number in range(NUM_CLIPS):
        paths = {"image": "red.png", "video": f"{number}.mp4"}
        shown = [{"type": kind, "path": paths[kind]} for kind in media[number % len(media)]]
        question = {"role": "user", "content": [*shown, {"type": "text", "text": "What is it?"}]}
        answer = {
            "role": "assistant",
            "content": [{"type": "text", "text": " ".join([str(number)] * (1 + number % 5))}],
        }
        lines.append(json.dumps({"messages": [question, answer]}))
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(model: Path, data: Path, output_dir: Path, **settings: Any) -> list[str]:
    """Of a run with batches of four samples, if it is one process that runs it."""
    source = {"format": "webvid", "annotations": str(data / "webvid.csv"), "media_root": str(data)}
    settings = {
        "model": model,
        "datasets": json.dumps([source]),
        "output_dir": output_dir,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "num_frames": 2,
        "save_steps": SAVED_STEP,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "adam_epsilon": 1e-3,  # what is rounded differently in a gradient that is next to nothing stays next to nothing
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def mixed_arguments(model: Path, data: Path, output_dir: Path, batch_size: int, **settings: Any) -> list[str]:
    """Of a run on texts with a video, images, both or nothing, which is evaluated at every step."""
    source = json.dumps([{"format": "chat", "annotations": str(data / "chat.jsonl"), "media_root": str(data)}])
    settings = {
        "datasets": source,
        "eval_datasets": source,
        "text_format": "chat",
        "max_steps": 3,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        # The first, as the loss falls, so that another is loaded than there is
        "load_best_model_at_end": True,
        "greater_is_better": True,
        **settings,
    }
    return arguments(model, data, output_dir, **settings)


@pytest.fixture(scope="module")
def one_mixed_process(
    model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float], list[float]]:
    """The folder, the losses and those of evaluation of a mixed run in this process alone."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    trainer = main(mixed_arguments(model_folder, data, folder, 2))
    return folder, losses(trainer), eval_losses(trainer)


@pytest.fixture(scope="module")
def one_process(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run in this process alone."""
    folder = tmp_path_factory.mktemp("one") / "run"
    trainer = main(arguments(model_folder, data, folder))
    return folder, losses(trainer)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_processes(
    request: pytest.FixtureRequest,
    model_folder: Path,
    data: Path,
    one_process: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """The kind, the folder with a folder for each of the runs, and what the processes saw of them."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    # The same batches of four: two processes, one sample each, twice
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    shutil.copytree(one_process[0] / f"checkpoint-{SAVED_STEP}", folder / "resumed" / f"checkpoint-{SAVED_STEP}")
    streamed = {"streaming": True, "max_steps": 1, "dataloader_num_workers": 2, "save_strategy": "no"}
    short = {"max_steps": 1, "save_strategy": "no"}
    source = json.dumps([{"format": "webvid", "annotations": str(data / "webvid.csv"), "media_root": str(data)}])
    evaluated = {"eval_datasets": source, "eval_strategy": "steps", "eval_steps": 1}
    runs = {
        "whole": arguments(model_folder, data, folder / "whole", **halves),
        "resumed": arguments(model_folder, data, folder / "resumed", **halves, resume_from_checkpoint="last"),
        "streamed": arguments(model_folder, data, folder / "streamed", **{**halves, **streamed}),
        "bf16": arguments(model_folder, data, folder / "bf16", **halves, **short, **evaluated, bf16=True),
        "mixed": mixed_arguments(model_folder, data, folder / "mixed", 1),
        "lora": arguments(model_folder, data, folder / "lora", **halves, **short, lora_r=2),
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    launch(kind, folder, Path(__file__).with_name("distributed_runs.py"), folder / "runs.json")
    found = {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in runs}
    return kind, folder, found


def launch(kind: str, folder: Path, script: Path, *argv: Any) -> None:
    """Runs a script in two processes, with the shipped configuration made one for CPUs."""
    settings = yaml.safe_load((CONFIGURATIONS / f"{kind}.yaml").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings |= {"num_processes": 2, "use_cpu": True, "mixed_precision": "no", "main_process_port": port}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "accelerate.yaml", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(
        [str(part) for part in (*command, *argv)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert output.returncode == 0, output.stdout[-3000:] + output.stderr[-6000:]


def assert_same_weights(found: Path, expected: Path) -> None:
    tensors, wanted = (load_file(folder / "trained_part.safetensors") for folder in (found, expected))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            tensors[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_run(run: Run, expected: Run) -> None:
    assert run[1] == pytest.approx(expected[1], rel=1e-5)
    assert_same_weights(run[0], expected[0])


def test_the_model_is_replicated_or_sharded(two_processes: Runs) -> None:
    kind, _, found = two_processes
    first, second = found["whole"]
    if kind == "ddp":
        assert first["kind"] == "MULTI_CPU" and first["wrapper"] == "DistributedDataParallel"
        assert first["held"] == second["held"] == first["num_parameters"]
    else:
        assert first["kind"] == "FSDP" and first["wrapper"].startswith("FSDP")
        # The frozen encoders, which processes run as often as their media need it
        encoders = ("model.vision_tower.", "model.q", "model.audio_")
        assert first["whole"] == second["whole"] and all(name.startswith(encoders) for name in first["whole"])
        assert first["num_whole"] == second["num_whole"] < first["num_parameters"]
        num_sharded = first["num_parameters"] - first["num_whole"]
        assert first["held"] + second["held"] == num_sharded + 2 * first["num_whole"]
        assert max(first["held"], second["held"]) < 0.6 * num_sharded + first["num_whole"]


def test_losses_and_weights_are_those_of_one_process(two_processes: Runs, one_process: Run) -> None:
    _, folder, found = two_processes
    expected_folder, expected = one_process
    assert len(expected) == NUM_STEPS and len(set(expected)) == NUM_STEPS
    assert_same_run((folder / "whole", found["whole"][0]["losses"]), one_process)
    for step in range(SAVED_STEP, NUM_STEPS, SAVED_STEP):
        assert_same_weights(folder / "whole" / f"checkpoint-{step}", expected_folder / f"checkpoint-{step}")


def test_two_processes_resume_what_one_has_saved(two_processes: Runs, one_process: Run) -> None:
    _, folder, found = two_processes
    assert_same_run((folder / "resumed", found["resumed"][0]["losses"]), one_process)


def test_one_process_resumes_what_two_have_saved(
    two_processes: Runs, one_process: Run, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    name = f"checkpoint-{SAVED_STEP}"
    shutil.copytree(two_processes[1] / "whole" / name, tmp_path / name)
    trainer = main(arguments(model_folder, data, tmp_path, resume_from_checkpoint="last"))
    assert_same_run((tmp_path, losses(trainer)), one_process)


def test_no_two_processes_or_workers_read_the_same_of_a_stream(two_processes: Runs) -> None:
    first, second = (found["streamed"] for found in two_processes[2]["streamed"])
    captions = [tuple(caption) for caption in first + second]
    assert len(first) == len(second) == NUM_STREAMED
    assert len(set(captions)) == NUM_CLIPS


def test_processes_may_have_different_media(
    two_processes: Runs, one_mixed_process: tuple[Path, list[float], list[float]]
) -> None:
    """A part that only some processes run must not have the others wait for it, in training and in evaluation."""
    _, folder, found = two_processes
    expected_folder, expected, expected_evaluations = one_mixed_process
    assert found["mixed"][0]["losses"] == pytest.approx(expected, rel=1e-5)
    assert found["mixed"][0]["eval_losses"] == pytest.approx(expected_evaluations, rel=1e-5)
    assert expected_evaluations[-1] == max(expected_evaluations) > expected_evaluations[-2]  # of the best
    assert_same_weights(folder / "mixed", expected_folder)


def test_what_is_trained_stays_float32_beside_frozen_bfloat16(two_processes: Runs, one_process: Run) -> None:
    _, folder, found = two_processes
    assert found["bf16"][0]["losses"] == pytest.approx(one_process[1][:1], rel=1e-2)
    tensors = load_file(folder / "bf16" / "trained_part.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # Not rounded on their way, and not by the evaluation before they were saved
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in tensors.values())


def test_an_adapter_is_saved_whole(two_processes: Runs, one_process: Run) -> None:
    _, folder, found = two_processes
    assert found["lora"][0]["losses"] == pytest.approx(one_process[1][:1], rel=1e-5)
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    assert tensors and all(tensor.numel() for tensor in tensors.values())


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed: pip install deepspeed")
def test_deepspeed_trains_and_resumes_as_one_process_does(
    model_folder: Path, data: Path, one_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    last = f"checkpoint-{SAVED_STEP}"
    for name, settings in (("whole", {}), ("resumed", {"resume_from_checkpoint": "last"})):
        if name == "resumed":  # its checkpoints need as many processes as wrote them
            shutil.copytree(tmp_path / "whole" / last, tmp_path / name / last)
        runs = {name: arguments(model_folder, data, tmp_path / name, **halves, **settings)}
        (tmp_path / "runs.json").write_text(json.dumps(runs))
        launch("deepspeed_zero3", tmp_path, Path(__file__).with_name("distributed_runs.py"), tmp_path / "runs.json")
        found = json.loads((tmp_path / f"{name}-0.json").read_text())
        assert found["kind"] == "DEEPSPEED" and found["wrapper"] == "DeepSpeedEngine"
        assert_same_run((tmp_path / name, found["losses"]), one_process)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_reads_the_shipped_configurations(kind: str) -> None:
    config = load_config_from_file(str(CONFIGURATIONS / f"{kind}.yaml"))
    types = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type.value == types[kind]
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (1, 8, "bf16")
