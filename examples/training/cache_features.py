"""Writes what the frozen encoders make of a data set's media, for training with `--feature_cache`.

    python examples/training/cache_features.py examples/training/video_stage2.yaml --feature_cache features
    torchrun --nproc_per_node 8 examples/training/cache_features.py …       # shared by the GPUs of a machine

Started again, it completes what was interrupted. Another model's features, or other frames, need another folder.
"""

from transformers_videollama.training.cache_features import main

if __name__ == "__main__":
    main()
