"""Trains a branch of Video-LLaMA: `python examples/training/train.py examples/training/video_stage1.yaml --model …`.

The YAML files beside this one hold the published settings; the README says how to run them.
"""

from transformers_videollama.training.run import main

if __name__ == "__main__":
    main()
