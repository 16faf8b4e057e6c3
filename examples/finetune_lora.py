"""Fine-tunes a model on one's own videos, with a LoRA adapter on its decoder, and asks the result.

    python examples/finetune_lora.py train.jsonl --model video-llama-2-7b --output runs/mine --ask 1.mp4 "What breaks?"

`train.jsonl` has one chat a line, with paths relative to it:

    {"messages": [{"role": "user", "content": [{"type": "video", "path": "1.mp4"}, {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "…"}]}]}

The video branch and the adapter are trained; the output holds both, some hundred megabytes. Interrupted, the same
command goes on. Further flags are settings of `examples/training/train.py`, such as `--learning_rate 1e-5`.
"""

import argparse
import json

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor, load_trained_part
from transformers_videollama.conversation import Conversation
from transformers_videollama.training.run import main as train


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", help="the chats to train on, JSON lines")
    parser.add_argument("--model", required=True, help="a converted folder or Hub id")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--ask", nargs=2, metavar=("VIDEO", "QUESTION"), help="what to ask before and after")
    args, settings = parser.parse_known_args(argv)

    if args.ask:
        print("before:", ask(args.model, None, *args.ask))
    train(
        ["--model", args.model, "--output_dir", args.output, "--resume_from_checkpoint", "last",
         "--datasets", json.dumps([{"format": "chat", "annotations": args.annotations}]), "--text_format", "chat",
         "--branch", "video", "--lora_r", str(args.rank), "--max_steps", str(args.steps),
         "--save_steps", str(max(args.steps // 10, 1)), "--save_total_limit", "2", *settings]
    )  # fmt: skip
    if args.ask:
        print("after:", ask(args.model, args.output, *args.ask))


def ask(base_model: str, trained: str | None, video: str, question: str) -> str:
    """The answer of a model, with what was trained on top of it or without."""
    model = VideoLlamaForConditionalGeneration.from_pretrained(base_model, dtype="auto", device_map="auto").eval()
    if trained is not None:
        load_trained_part(model, trained)
        model.load_adapter(trained)
    chat = Conversation(model, VideoLlamaProcessor.from_pretrained(base_model))
    return chat.ask(question, [{"type": "video", "path": video}], max_new_tokens=64, do_sample=False)


if __name__ == "__main__":
    main()
