"""Walks over a model's modules and parameters. A trainer takes several at every step, and PyTorch's own put the names
together as well, which takes longer than all else that the trainer does around the model."""

from collections.abc import Iterator

from torch import nn


def walk_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The module and all below it, one that is in several places as often."""
    ahead = [root]
    while ahead:
        module = ahead.pop()
        yield module
        ahead.extend(child for child in module._modules.values() if child is not None)


def walk_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the module and of all below it, one that is in several places as often."""
    for module in walk_modules(root):
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter
