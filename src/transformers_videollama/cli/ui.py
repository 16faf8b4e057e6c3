"""Shows a page in the browser on which people upload a video or a picture, or record one, and talk about it.

    videollama ui --model video-llama-2-7b
    videollama ui --host 0.0.0.0 --port 7860

Each visitor has a chat and media apart from those of others; they are removed when the page is closed. The settings
of answers below are those that the page begins with. Ctrl-C ends it.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from . import UsageError, make_parser
from .models import MINIWORLD, add_generation_arguments, add_model_arguments, load_model, positive
from .serve import LOOPBACK, add_allowed_host_argument, allowed_hosts, bind

HELP = "talk about videos on a page in the browser"
_MEGABYTE = 2**20
"""As the page's own message for a larger file counts."""


def main(argv: list[str]) -> None:
    parser = make_parser("ui", __doc__)
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    group.add_argument("--port", type=int, default=7860, help="0 for any that is free (default: %(default)s)")
    add_allowed_host_argument(group)
    group.add_argument(
        "--max-file-mb", type=positive, default=100, help="megabytes of the largest upload (default: %(default)s)"
    )
    group.add_argument("--max-media-seconds", type=positive, default=600, help="longest video (default: %(default)s)")
    add_model_arguments(parser)
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    with bind(args.host, args.port) as listener, tempfile.TemporaryDirectory(prefix="videollama-ui-") as folder:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed, whenever it comes
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio as gr
        except ImportError as error:
            raise UsageError(f"{error}: pip install 'transformers_videollama[ui]'") from error
        gr.set_static_paths(Path(folder) / "examples")
        show_page(args, listener, Path(folder))


def show_page(args: argparse.Namespace, listener: socket.socket, folder: Path) -> None:
    """Shows the page at a bound socket until a signal ends it. Uploads and examples are kept in the folder."""
    from transformers import set_seed

    from ..ui.events import PageEvents
    from ..ui.examples import render_examples
    from ..ui.page import make_page
    from ..ui.server import PageServer
    from ..ui.visitors import Visitors

    logging.basicConfig(format="%(levelname)s: %(message)s")
    model, processor = load_model(args)
    set_seed(args.seed)
    visitors = Visitors(folder / "uploads")
    events = PageEvents(
        model,
        processor,
        visitors,
        max_seconds=args.max_media_seconds,
        system_prompt=args.system_prompt,
        num_frames=args.num_frames,
    )
    page = make_page(
        events,
        render_examples(MINIWORLD, folder / "examples"),
        title=Path(args.model).name if args.model else "miniworld",
        limits=f"Files of up to {args.max_file_mb} MB and {args.max_media_seconds} seconds are taken.",
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        listens=not args.no_audio,
    )
    if args.host not in LOOPBACK:
        print("Anyone who reaches this page can use it.", file=sys.stderr)
    try:
        hosts = allowed_hosts(args.host, args.allowed_host)
        PageServer(page, listener, args.max_file_mb * _MEGABYTE, hosts, visitors).run([listener])
    finally:
        events.close()
