"""The optimiser of the training: learning rates and weight decay are the published ones, at every step and for every
tensor."""

import math
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE
from published_names import translate
from torch import nn
from training_runs import make_model, make_trainer

from transformers_videollama import VideoLlamaForConditionalGeneration
from transformers_videollama.training.optimization import (
    get_decay_parameter_names,
    get_published_schedule,
    published_learning_rate,
)

# Steps in all, of the warm-up, peak, minimum: both stages of both branches
PUBLISHED = {
    "video 1": (12500, 2500, 1e-4, 8e-5),
    "video 2": (3000, 1000, 3e-5, 1e-5),
    "audio 1": (25000, 5000, 1e-4, 8e-5),
    "audio 2": (3000, 400, 3e-5, 1e-5),
}


def published(step: int, total: int, warmup: int, peak: float, minimum: float) -> float:
    if step < warmup:
        return 1e-6 + (peak - 1e-6) * step / warmup
    return (peak - minimum) / 2 * (1 + math.cos(math.pi * step / total)) + minimum


@pytest.mark.parametrize("stage", PUBLISHED)
def test_learning_rates_are_the_published_ones(stage: str) -> None:
    total, warmup, peak, minimum = PUBLISHED[stage]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = get_published_schedule(optimizer, total, warmup, minimum, 1e-6)
    wanted = {0, 1, 17, warmup // 2, warmup - 1, warmup, warmup + 1, total // 2, total - 1}
    for step in range(total):
        if step in wanted:
            expected = published(step, *PUBLISHED[stage])
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
            assert published_learning_rate(step, total, warmup, peak, minimum, 1e-6) == pytest.approx(
                expected, rel=1e-12
            )
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(minimum, rel=1e-6)


def test_the_cosine_does_not_start_anew_after_the_warm_up() -> None:
    total, warmup, peak, minimum = PUBLISHED["video 1"]
    before, after = (
        published_learning_rate(step, total, warmup, peak, minimum, 1e-6) for step in (warmup - 1, warmup)
    )
    assert before == pytest.approx(peak, rel=1e-3)
    # A fifth of the half wave is over: (1 + cos 36°) / 2 of the way from the minimum to the peak
    assert after == pytest.approx(minimum + (peak - minimum) * (1 + math.cos(math.pi / 5)) / 2)


@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_learning_rates_stay_between_their_limits(warmup: int) -> None:
    rates = [published_learning_rate(step, 10, warmup, 1e-3, 1e-4, 1e-6) for step in range(12)]
    assert all(1e-6 <= rate <= 1e-3 for rate in rates)
    assert rates[10:] == [pytest.approx(1e-4)] * 2


def test_a_schedule_goes_on_where_it_was_saved() -> None:
    def make() -> torch.optim.lr_scheduler.LambdaLR:
        return get_published_schedule(torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3), 20, 5, 1e-4, 1e-6)

    first, second = make(), make()
    for _ in range(8):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    for schedule in (first, second):
        schedule.optimizer.step()
        schedule.step()
    assert second.get_last_lr() == first.get_last_lr()


@pytest.mark.parametrize("branch, file", [("video", "finetune_vl.pth"), ("audio", "finetune_al.pth")])
def test_the_same_tensors_decay_as_under_their_published_names(branch: str, file: str, tiny_folder: Path) -> None:
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder)
    trained = model.set_trainable(branch)
    tensors = torch.load(REFERENCE / "tiny" / file, weights_only=True)["model"]
    expected, seen = set(), set()
    for published_name, tensor in tensors.items():
        for name in set(translate(published_name) or ()) & set(trained):
            seen.add(name)
            if tensor.ndim >= 2 and not any(part in published_name for part in ("bias", "ln", "bn")):
                expected.add(name)
    assert seen == set(trained)
    assert set(get_decay_parameter_names(model)) & set(trained) == expected


@pytest.mark.parametrize("branch", ["video", "audio"])
def test_groups_hold_each_trainable_tensor_once_and_no_other(branch: str, tmp_path: Path) -> None:
    model = make_model()
    model.set_trainable(branch)
    trainer = make_trainer(tmp_path, model=model)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: [names[id(parameter)] for parameter in group["params"]]
        for group in optimizer.param_groups
    }
    trained = [name for name in names.values() if name.startswith(f"model.{branch}_branch.")]
    assert sorted(groups[0.05] + groups[0.0]) == sorted(trained)
    for name in groups[0.05]:
        assert model.get_parameter(name).ndim >= 2 and not name.endswith("bias")
    for name in groups[0.0]:
        assert model.get_parameter(name).ndim < 2
    assert f"model.{branch}_branch.query_tokens" in groups[0.05]
    assert f"model.{branch}_branch.position_embedding.weight" in groups[0.05]
