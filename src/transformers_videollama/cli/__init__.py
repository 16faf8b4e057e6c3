"""The command `videollama`: one module for each of its commands, imported when the command is used.

A command module has `HELP`, the line about it in the list of commands, and `main(argv)`. A user's mistake is raised as
[`UsageError`], or as one of the errors with which the package refuses media and settings, and is shown as one line.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = ("ask", "chat", "caption", "batch", "serve", "ui", "convert", "train", "eval", "info")


class UsageError(Exception):
    """A mistake of the user's; the message says what was expected, what came and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; those of the process by default.

    Returns:
        `int`: 0, 1 for a mistake, 2 for wrong flags (from `argparse`), 130 if interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        _list_commands(argv)
        return 0
    # What the libraries have to say about models is of no use to whoever asks about a video
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return importlib.import_module(f".{argv[0]}", __name__).main(argv[1:]) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 0
    except (UsageError, OSError, ValueError, ImportError) as error:
        if os.environ.get("VIDEOLLAMA_DEBUG"):
            raise
        print(f"videollama {argv[0]}: error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or os.environ.get("VIDEOLLAMA_DEBUG"):  # torch's, not imported
            raise
        print(
            f"videollama {argv[0]}: error: {error} A smaller --batch-size, --load-in-8bit or --load-in-4bit may help, "
            "where the command has them.",
            file=sys.stderr,
        )
        return 1


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, whose help shows `description` as it is written."""
    return argparse.ArgumentParser(
        prog=f"videollama {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _list_commands(argv: list[str]) -> None:
    """Shows all commands; exits with 2 where one was given that is none of them."""
    parser = argparse.ArgumentParser(
        prog="videollama",
        description="Video-LLaMA: answers questions about what is seen and heard in a video.",
        epilog="videollama COMMAND --help tells about a command. VIDEOLLAMA_DEBUG=1 shows where an error comes from.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        commands.add_parser(name, help=importlib.import_module(f".{name}", __name__).HELP)
    if not argv:
        parser.print_help()
        return
    parser.parse_args(argv)
