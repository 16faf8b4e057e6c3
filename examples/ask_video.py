"""Asks a video questions with the library's pipeline and prints the answers.

    python examples/ask_video.py clip.mp4 "What do you see?" "What do you hear?" --model video-llama-2-7b

Without `--model` the small trained model of the repository answers, which knows nothing but its own miniature world.
"""

import argparse

from transformers import pipeline

import transformers_videollama  # noqa: F401  (registers the model and the pipeline)
from transformers_videollama.cli.models import find_model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", help="a video file or URL")
    parser.add_argument("questions", nargs="+", help="questions about what is seen and heard")
    parser.add_argument("--model", help="a converted folder or Hub id (default: the small trained model)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    model, options = find_model(args.model)
    ask = pipeline("video-text-to-text", model=model, device_map="auto", model_kwargs=options)
    for question in args.questions:
        outputs = ask(
            args.video, text=question, max_new_tokens=args.max_new_tokens, do_sample=False, return_full_text=False
        )
        print(f"Q: {question}\nA: {outputs[0]['generated_text']}")


if __name__ == "__main__":
    main()
