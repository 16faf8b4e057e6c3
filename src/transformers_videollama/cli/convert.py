"""Converts published checkpoints to a folder that `from_pretrained` loads. The scripts are in a clone of the
repository.

    videollama convert --llama Llama-2-7b-chat-hf --vl-checkpoint VL_LLaMA_2_7B_Finetuned.pth … \\
        --output-dir video-llama-2-7b
"""

import sys
from pathlib import Path

from . import UsageError

HELP = "convert published checkpoints"
CONVERSION = Path(__file__).resolve().parents[3] / "conversion"


def main(argv: list[str]) -> int:
    if not (CONVERSION / "convert_video_llama_checkpoint.py").is_file():
        raise UsageError("The conversion scripts are in a clone of the repository: run the command there.")
    sys.path.insert(0, str(CONVERSION))
    from convert_video_llama_checkpoint import main as convert

    return convert(argv)
