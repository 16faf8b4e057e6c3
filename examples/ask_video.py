"""Asks a video questions and prints the answers.

    python examples/ask_video.py VIDEO QUESTION [QUESTION ...] [--model FOLDER_OR_HUB_ID]

Without `--model` the small reference model of the tests is converted and used: it shows that everything runs, but its
weights are random, so its answers are noise.
"""

import argparse
import sys
from pathlib import Path

from transformers import pipeline

import transformers_videollama  # noqa: F401  (registers the model and the pipeline)

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY / "tests" / "reference" / "tiny"


def convert_reference_model() -> Path:
    """Converts the reference model's published-format files, once, and returns the folder."""
    sys.path.insert(0, str(REPOSITORY / "conversion"))
    from convert_video_llama_checkpoint import main as convert

    folder = REPOSITORY / ".cache" / "reference-model"
    if not (folder / "config.json").exists():
        files = {
            "--eva-vit": "eva_vit_g.pth",
            "--blip2": "blip2_pretrained_flant5xxl.pth",
            "--imagebind": "imagebind_huge.pth",
            "--llama": "llama",
            "--vl-checkpoint": "finetune_vl.pth",
            "--al-checkpoint": "finetune_al.pth",
        }
        convert([part for flag, name in files.items() for part in (flag, str(REFERENCE / name))]
                + ["--family", "llama_2", "--output-dir", str(folder)])  # fmt: skip
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks a video questions and prints the answers.")
    parser.add_argument("video", help="a video file or URL")
    parser.add_argument("questions", nargs="+", help="questions about what is seen and heard")
    parser.add_argument("--model", help="a converted folder or Hub id (default: the reference model, which is random)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    model = args.model
    if model is None:
        print("No --model given: using the small reference model. Its weights are random, so its answers are noise.")
        model = str(convert_reference_model())
    answer = pipeline("video-text-to-text", model=model, device_map="auto")
    for question in args.questions:
        outputs = answer(
            args.video, text=question, max_new_tokens=args.max_new_tokens, do_sample=False, return_full_text=False
        )
        print(f"Q: {question}\nA: {outputs[0]['generated_text']}")


if __name__ == "__main__":
    main()
