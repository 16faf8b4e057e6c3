"""The benchmark in `benchmarks/training.py` runs and prints every row; what its numbers are is not tested."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("training_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture(scope="module")
def turns(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Each contender, ready for stage 1 of the video branch."""
    folder, size = tmp_path_factory.mktemp("data"), benchmark.SIZES["tiny"]
    load = benchmark.Load(48, 64, 1, 2, batch_size=2, warm_up=1, steps=1, plain_steps=1, workers=0)
    benchmark.write_data(folder, load, num_rows=8)
    processor = benchmark.build_processor(size.text["vocab_size"])
    model = benchmark.build_trainable(size, "video", processor, CPU, torch.float32)
    benchmark.write_cache(model, "video", processor, folder)
    return {
        name: benchmark.Turn("video_stage1", name, model, processor, folder, load, "cpu")
        for name in benchmark.CONTENDERS
    }


def test_table_has_every_row_and_only_ratios_on_a_cpu():
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--device", "cpu", "--repeats", "1"]
    result = subprocess.run([*command, "--stages", "audio_stage2"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("|")]
    assert table[0] == ["row", "online to plain", "cached to plain", "cached to online"]
    assert [line[0] for line in table[2:]] == ["audio_stage2, batch 2", "audio_stage2, peak memory"]
    assert all(float(ratio.removesuffix("x")) > 0 for line in table[2:] for ratio in line[1:])


def test_contenders_train_on_the_same_samples(turns):
    online, plain = turns["online"].first_batch(), turns["plain"].first_batch()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in online.items())
    cached = turns["cached"].first_batch()
    assert torch.equal(cached["input_ids"], online["input_ids"]) and "video_frame_features" in cached


def test_contenders_change_the_branch_and_nothing_else(turns):
    model = turns["online"].model
    for turn in turns.values():
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert turn.run(iter(range(2)).__next__) == 1 / turn.batch_size  # of a clock that ticks once a look
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed and all(name.startswith("model.video_branch.") for name in changed)


def test_a_cache_saves_the_arithmetic_of_the_encoders(benchmark, turns):
    batch = turns["online"].first_batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        turns["online"].model.model.get_frame_features(batch["pixel_values_videos"].flatten(0, 1))
    online, cached = (benchmark.count_flops(turns[name]) for name in ("online", "cached"))
    assert online - cached == counter.get_total_flops() // turns["online"].batch_size
