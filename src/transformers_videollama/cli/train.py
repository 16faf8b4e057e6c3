"""Trains a branch, as `examples/training/train.py` does: from a YAML file of settings, each of which is a flag as
well.

    videollama train video_stage2.yaml --model video-llama-2-7b --output_dir runs/stage2
    torchrun --nproc_per_node 8 -m transformers_videollama train video_stage2.yaml …

All settings: `videollama train --help`.
"""

HELP = "train a branch on your own videos"


def main(argv: list[str]) -> None:
    from ..training.run import main as train

    train(argv)
