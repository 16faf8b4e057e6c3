"""Asks questions about videos, pictures or sounds, each in a chat of its own, and prints the answers.

    videollama ask clip.mp4 "What do you see?" "What do you hear?"
    videollama ask *.mp4 "What happens?" --json

Without a question it asks what happens.
"""

import argparse
import json
import sys

from . import make_parser
from .media_arguments import media_entry, split_media
from .models import (
    add_generation_arguments,
    add_model_arguments,
    generate_arguments,
    load_model,
    processor_arguments,
)

HELP = "ask questions about videos, pictures or sounds"


def main(argv: list[str]) -> int:
    parser = make_parser("ask", __doc__)
    parser.add_argument(
        "arguments", nargs="+", metavar="FILE_OR_QUESTION", help="files or addresses, and questions about each of them"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each answer: file, question, answer")
    parser.add_argument("--no-stream", action="store_true", help="print answers when they are complete")
    add_model_arguments(parser)
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    media, questions = split_media(args.arguments)
    if not questions:
        questions = ["What happens in the video?"]
    return answer_questions(args, media, questions)


def answer_questions(args: argparse.Namespace, media: list[str], questions: list[str]) -> int:
    """
    Prints the answers to all questions about all media; each medium is encoded once. Returns the exit status: 1 if
    some of several media cannot be used, which are named and passed over.
    """
    from transformers import set_seed

    from ..conversation import Conversation
    from ..media import MediaError

    status = 0
    model, processor = load_model(args)
    has_titles = len(media) * len(questions) > 1
    for medium in media:
        chat = Conversation(model, processor, args.system_prompt, **processor_arguments(args))
        if len(media) > 1:
            try:
                chat.read([media_entry(medium)])
            except MediaError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                status = 1
                continue
        start = chat.messages
        for question in questions:
            set_seed(args.seed)
            is_streamed = not (args.json or args.no_stream)
            if has_titles and not args.json:
                print(f"{medium}: {question}" if len(media) > 1 else f"Q: {question}", flush=True)
            chat.messages = start  # a chat of its own, that shares the medium
            answer = chat.ask(
                question,
                [media_entry(medium)],
                on_text=_print_now if is_streamed else None,
                **generate_arguments(args),
            )
            if args.json:
                print(
                    json.dumps({"file": medium, "question": question, "answer": answer}, ensure_ascii=False),
                    flush=True,
                )
            else:
                print("" if is_streamed else answer, flush=True)
    return status


def _print_now(text: str) -> None:
    print(text, end="", flush=True)
