"""Describes videos, pictures or sounds.

    videollama caption clip.mp4
    videollama caption *.mp4 --json

To ask something else, use `videollama ask`.
"""

from . import UsageError, make_parser
from .ask import answer_questions
from .media_arguments import split_media
from .models import add_generation_arguments, add_model_arguments

HELP = "describe videos, pictures or sounds"


def main(argv: list[str]) -> int:
    parser = make_parser("caption", __doc__)
    parser.add_argument("arguments", nargs="+", metavar="FILE", help="files or addresses")
    parser.add_argument("--prompt", default="Describe the video.", help="what is asked (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each file: file, question, answer")
    parser.add_argument("--no-stream", action="store_true", help="print descriptions when they are complete")
    add_model_arguments(parser)
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    media, others = split_media(args.arguments)
    if others:
        raise UsageError(f"There is no file {others[0]!r}. To ask something, use `videollama ask`.")
    return answer_questions(args, media, [args.prompt])
