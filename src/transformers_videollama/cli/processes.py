"""The processes that share the work of a command: those of `accelerate launch` or `torchrun`, else one alone."""

import argparse
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=7)
"""How long a process waits for the others, whose shares may take longer."""


def join_processes(args: argparse.Namespace) -> "PartialState":
    """
    Meets the other processes.

    Args:
        args (`argparse.Namespace`): With `device`, which becomes the process's own where none was named.

    Returns:
        `PartialState`: which of the processes this one is.
    """
    from accelerate import PartialState

    state = PartialState(cpu=args.device == "cpu", timeout=PATIENCE)
    if args.device is None:
        args.device = str(state.device)
    return state
