"""Talks about a video, a picture or a sound over several turns; it is encoded once.

    videollama chat clip.mp4

Commands: /open FILE adds another medium, /clear forgets what was said, /system TEXT sets the system prompt, /help,
/quit. Ctrl-C stops an answer.
"""

import sys

from . import UsageError, make_parser
from .media_arguments import media_entry, split_media
from .models import (
    add_generation_arguments,
    add_model_arguments,
    generate_arguments,
    load_model,
    processor_arguments,
)

HELP = "talk about a video over several turns"
_COMMANDS = "/open FILE, /clear, /system TEXT, /help, /quit"


def main(argv: list[str]) -> None:
    parser = make_parser("chat", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or addresses to talk about")
    add_model_arguments(parser)
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    from jinja2 import TemplateError
    from transformers import set_seed

    from ..conversation import Conversation

    media, others = split_media(args.files)
    if others:
        raise UsageError(f"There is no file {others[0]!r}. Questions are asked once the chat has begun.")
    model, processor = load_model(args)
    set_seed(args.seed)
    options = processor_arguments(args)
    system_prompt = args.system_prompt
    chat = Conversation(model, processor, system_prompt, **options)
    new = [media_entry(medium) for medium in media]
    chat.read(new)
    print(f"About {', '.join(media)}. {_COMMANDS}", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        if command == "/help":
            print(_COMMANDS, file=sys.stderr)
        elif command == "/open":
            try:
                opened = [*new, *(media_entry(medium) for medium in split_media([rest])[0])]
                chat.read(opened)
                new = opened
            except (UsageError, ValueError, OSError) as error:
                print(error, file=sys.stderr)
        elif command in ("/clear", "/system"):
            new = [entry for message in chat.messages for entry in _media_of(message)] + new
            if command == "/system":
                system_prompt = rest
            chat = Conversation(model, processor, system_prompt, **options)
        elif command.startswith("/"):
            print(f"{command} is no command: {_COMMANDS}", file=sys.stderr)
        else:
            try:
                chat.ask(line, new, on_text=lambda text: print(text, end="", flush=True), **generate_arguments(args))
                new = []
            except (ValueError, TemplateError) as error:  # such as a placeholder in the question
                print(error, file=sys.stderr)
            except KeyboardInterrupt:  # the question was not asked
                print(" …", end="")
            print(flush=True)


def _media_of(message: dict) -> list[dict]:
    return [entry for entry in message["content"] if entry["type"] != "text"]
