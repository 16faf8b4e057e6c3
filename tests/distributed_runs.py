"""What every process of `test_training_distributed.py` runs, under `accelerate launch`: several training runs, one
after another.

    accelerate launch … distributed_runs.py runs.json

`runs.json` maps the names of runs to the arguments of `examples/training/train.py`. Each process writes what it saw of
a run to `<name>-<rank>.json` beside it.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from training_runs import eval_losses, losses

from transformers_videollama.training.mixture import TrainIterableDataset
from transformers_videollama.training.run import main

NUM_STREAMED = 6  # samples that each process reads of a stream


def run_all(path: Path) -> None:
    for name, argv in json.loads(path.read_text()).items():
        trainer = main(argv)
        parameters = dict(trainer.model.named_parameters())
        found = {
            "losses": losses(trainer),
            "eval_losses": eval_losses(trainer),
            "kind": trainer.accelerator.distributed_type.value,
            "wrapper": type(trainer.model_wrapped).__name__,
            "whole": sorted(name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)),
            "num_whole": sum(p.numel() for p in parameters.values() if not isinstance(p, DTensor)),
            "num_parameters": sum(parameter.numel() for parameter in parameters.values()),
            "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values()),
        }
        if isinstance(trainer.train_dataset, TrainIterableDataset):
            trainer.train_dataset.load_position(None)
            trainer._num_batches_done = 0
            batches = itertools.islice(trainer.get_train_dataloader(), NUM_STREAMED)
            found["streamed"] = [batch["labels"][batch["labels"] != -100].tolist() for batch in batches]
        rank = trainer.args.process_index
        path.with_name(f"{name}-{rank}.json").write_text(json.dumps(found))
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]))
