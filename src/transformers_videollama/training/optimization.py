"""The published optimiser settings: which tensors decay, and the learning rate of every step.

Used by `trainer.VideoLlamaTrainer`, which hands the groups and the schedule to `transformers`.
"""

import math
from functools import partial

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Parts of names whose tensors the published system keeps from decaying, whatever their shape
_NO_DECAY = ("bias", "ln", "bn")


def published_learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    warmup_start_learning_rate: float,
) -> float:
    """
    The published system's learning rate: a straight line up to the peak, then a cosine down to the minimum.

    The cosine is a function of the step counted from the start of the training, not from the end of the warm-up, so
    that the learning rate drops a little where the warm-up ends.

    Args:
        step (`int`): Optimiser steps made so far: 0 at the first step.
        total_steps (`int`): Steps of the whole training.
        warmup_steps (`int`): Steps of the warm-up, which may be 0.
        learning_rate (`float`): The peak.
        min_learning_rate (`float`): What the cosine ends at.
        warmup_start_learning_rate (`float`): What the warm-up starts at.

    Returns:
        `float`: the learning rate of this step.
    """
    if step < warmup_steps:
        slope = (learning_rate - warmup_start_learning_rate) / warmup_steps
        return min(learning_rate, warmup_start_learning_rate + slope * step)
    cosine = math.cos(math.pi * min(step / max(total_steps, 1), 1.0))
    return (learning_rate - min_learning_rate) / 2 * (1 + cosine) + min_learning_rate


def get_published_schedule(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int,
    min_learning_rate: float,
    warmup_start_learning_rate: float,
) -> LambdaLR:
    """
    [`published_learning_rate`] as a PyTorch scheduler. The peak is the learning rate that the optimizer was made with.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, all of whose groups have the same learning rate.
        total_steps, warmup_steps, min_learning_rate, warmup_start_learning_rate:
            As for [`published_learning_rate`].
    """
    group = optimizer.param_groups[0]  # DeepSpeed's have no `defaults`
    peak = group.get("initial_lr", group["lr"])
    return LambdaLR(
        optimizer,
        partial(
            _fraction_of_peak,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            learning_rate=peak,
            min_learning_rate=min_learning_rate,
            warmup_start_learning_rate=warmup_start_learning_rate,
        ),
    )


def _fraction_of_peak(step: int, learning_rate: float, **kwargs: float) -> float:
    if learning_rate == 0:
        return 0.0
    return published_learning_rate(step, learning_rate=learning_rate, **kwargs) / learning_rate


def get_decay_parameter_names(model: nn.Module) -> list[str]:
    """
    Names of the parameters that weight decay applies to: as published, all but tensors of fewer than two dimensions
    and those with `bias`, `ln` or `bn` in their name. Applied to this model's names the rule splits the trainable
    tensors as it does under the published ones.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        # DeepSpeed's ZeRO-3 leaves an empty tensor in the place of a parameter and notes its shape
        if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and not any(part in name for part in _NO_DECAY)
    ]
