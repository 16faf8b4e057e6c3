"""The benchmark in `benchmarks/inference.py` runs and prints every row; what its numbers are is not tested."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "inference.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inference_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_table_has_every_row_and_only_ratios_on_a_cpu():
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--device", "cpu", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("|")]
    assert table[0] == ["row", "ours to (a)", "ours to (b)"]
    rows = {line[0]: line[1:] for line in table[2:]}
    assert list(rows) == [
        "vision path, 8 frames",
        "audio path, 8 clips",
        "prefill",
        "decode",
        "8 frames + sound + 64 tokens",
        "peak memory, with sound",
    ]
    for name, (to_a, to_b) in rows.items():
        assert (to_a == "none") == name.startswith("audio")  # InstructBlipVideo hears nothing
        assert all(float(ratio.removesuffix("x")) > 0 for ratio in (to_a, to_b) if ratio != "none")


def test_contenders_share_what_they_are_compared_on(benchmark: ModuleType):
    size = benchmark.SIZES["tiny"]
    ours, other = benchmark.video_llama_config(size), benchmark.instructblipvideo_config(size)
    for part in ("vision_config", "qformer_config"):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            assert getattr(getattr(ours, part), name) == getattr(getattr(other, part), name)
    assert ours.text_config.to_dict() == other.text_config.to_dict()


def test_too_large_a_size_is_refused_before_anything_is_allocated(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(benchmark.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    args = argparse.Namespace(size="tiny", device="cpu", dtype="float32")
    with pytest.raises(SystemExit):
        benchmark.check_arguments(args, argparse.ArgumentParser())
    assert "choose a smaller --size" in capsys.readouterr().err


def test_flops_are_the_counted_ones(benchmark: ModuleType):
    """The formula against PyTorch's own count of the same pass."""
    from torch.utils.flop_counter import FlopCounterMode

    cpu, dtype = benchmark.torch.device("cpu"), benchmark.torch.float32
    contender = benchmark.build_contender("b", benchmark.SIZES["tiny"], cpu, dtype)
    contender.model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        contender.encode(contender.frames)
    assert benchmark.vision_flops(contender.model.config, 1, 8) == pytest.approx(counter.get_total_flops(), rel=0.01)
