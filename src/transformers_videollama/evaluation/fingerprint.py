"""Tells the weights of a model from others, at a glance."""

import hashlib

import torch
from torch import nn

_NUM_SAMPLES = 4096


def weights_fingerprint(model: nn.Module) -> str:
    """
    A hash of the names, shapes and number formats of a model's weights, and of up to 4096 values spread over each.

    Returns:
        `str`: 16 hexadecimal digits; training changes them, moving the model to another device does not.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        sample = values[:: max(len(values) // _NUM_SAMPLES, 1)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
