"""Answers questions over HTTP, as the OpenAI API does: POST /v1/chat/completions with `video_url`, `image_url`,
`input_audio` and `audio_url` parts, whole or as a stream; GET /v1/models; GET /health.

    videollama serve --model video-llama-2-7b --port 8000
    VIDEOLLAMA_API_KEY=secret videollama serve --host 0.0.0.0

Requests are answered in batches. The settings of answers below are those of requests that do not say. SIGTERM and
Ctrl-C let the requests that were taken be answered; a second one stops the server at once.
"""

import argparse
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from . import UsageError, make_parser
from .models import (
    add_generation_arguments,
    add_model_arguments,
    load_model,
    not_negative,
    positive,
    processor_arguments,
)

HELP = "answer questions over HTTP, as the OpenAI API does"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MEGABYTE = 10**6


def main(argv: list[str]) -> None:
    parser = make_parser("serve", __doc__)
    _add_server_arguments(parser)
    _add_request_arguments(parser)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    args = parser.parse_args(argv)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error}: pip install 'transformers_videollama[serve]'") from error
    if args.allow_local_files is not None and not args.allow_local_files.is_dir():
        raise UsageError(f"--allow-local-files: {args.allow_local_files} is no folder.")
    with bind(args.host, args.port) as listener:
        serve(args, listener)


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    group.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)")
    add_allowed_host_argument(group)
    group.add_argument(
        "--api-key",
        default=os.environ.get("VIDEOLLAMA_API_KEY") or None,
        help="key that requests need (default: the environment's VIDEOLLAMA_API_KEY, else none)",
    )
    group.add_argument("--served-model-name", help="what requests call the model (default: its Hub id or folder name)")
    group.add_argument("--batch-size", type=positive, default=8, help="requests at a time (default: %(default)s)")
    group.add_argument(
        "--batch-window",
        type=not_negative,
        default=0.02,
        metavar="SECONDS",
        help="how long a request waits for others to join it (default: %(default)s)",
    )
    group.add_argument(
        "--max-queue", type=positive, default=64, help="requests that may wait; others get 429 (default: %(default)s)"
    )
    group.add_argument(
        "--workers", type=positive, default=4, help="requests whose media are read at a time (default: %(default)s)"
    )


def _add_request_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what requests may bring")
    group.add_argument(
        "--max-file-mb", type=positive, default=100, help="megabytes of the largest file (default: %(default)s)"
    )
    group.add_argument(
        "--max-body-mb",
        type=positive,
        default=50,
        help="megabytes of a request, with the files that are in it (default: %(default)s)",
    )
    group.add_argument(
        "--max-media-seconds", type=positive, default=600, help="longest video or sound (default: %(default)s)"
    )
    group.add_argument("--max-files", type=positive, default=8, help="files of a request (default: %(default)s)")
    group.add_argument(
        "--fetch-timeout",
        type=positive,
        default=30,
        metavar="SECONDS",
        help="for all files of a request to be fetched (default: %(default)s)",
    )
    group.add_argument(
        "--decode-timeout",
        type=positive,
        default=120,
        metavar="SECONDS",
        help="for all files of a request to be decoded (default: %(default)s)",
    )
    group.add_argument(
        "--allow-local-files", type=Path, metavar="FOLDER", help="open files in this folder by their paths"
    )
    group.add_argument(
        "--allow-private-addresses",
        action="store_true",
        help="fetch from private, local and reserved addresses, which give whoever asks a look into your network",
    )


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Answers requests at a bound socket until a signal ends it."""
    from ..serving.app import Service
    from ..serving.batching import Batcher
    from ..serving.fetching import FetchRules
    from ..serving.preparation import Preparation
    from ..serving.server import Server

    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("transformers_videollama").setLevel(logging.INFO)
    model, processor = load_model(args)
    preparation = Preparation(
        processor,
        FetchRules(
            max_bytes=args.max_file_mb * _MEGABYTE,
            max_seconds=args.fetch_timeout,
            local_folder=args.allow_local_files and args.allow_local_files.resolve(),
            allow_private_addresses=args.allow_private_addresses,
        ),
        num_threads=args.workers,
        max_files=args.max_files,
        max_seconds=args.max_media_seconds,
        max_decoding_seconds=args.decode_timeout,
        context_length=model.config.text_config.max_position_embeddings,
        system_prompt=args.system_prompt,
        **processor_arguments(args),
    )
    batcher = Batcher(model, processor, args.batch_size, args.batch_window)
    service = Service(
        model_name(args),
        preparation,
        batcher,
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_mb * _MEGABYTE,
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        api_key=args.api_key,
    )
    if args.api_key is None and args.host not in LOOPBACK:
        print("Anyone who reaches this server can use it: set VIDEOLLAMA_API_KEY.", file=sys.stderr)
    batcher.start()
    try:
        Server(service, listener, allowed_hosts(args.host, args.allowed_host)).run([listener])
    finally:
        preparation.close()
        batcher.close()


def model_name(args: argparse.Namespace) -> str:
    """What requests call the model: its Hub id or the name of its folder, of which they need not know the rest."""
    name = args.served_model_name or args.model or "miniworld"
    return Path(name).resolve().name if os.path.isdir(name) and args.served_model_name is None else name


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address. It listens when the model is there; that the address is free is known before."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(f"Cannot listen at {host}, port {port}: {error}.") from error
    return listener


def add_allowed_host_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allowed-host",
        type=_host_name,
        action="append",
        default=[],
        metavar="NAME",
        help="name by which the server is asked, beside those of this machine; may be given several times, "
        "*.example.org and * go, too (default: none if only this machine reaches it, else any)",
    )


def allowed_hosts(host: str, names: Sequence[str]) -> list[str]:
    """
    The hosts that requests may name. A page in a browser can give its own name the address of a server that only this
    machine reaches, which would then answer the page: its requests name the page's host.

    Args:
        host (`str`): What the server listens at.
        names (`Sequence[str]`): Further hosts. Where there are none, others than this machine may use any, because
            nobody knows what they call it.

    Returns:
        `list[str]`: for Starlette's `TrustedHostMiddleware`.
    """
    if host not in LOOPBACK and not names:
        return ["*"]
    # "[" is what older versions of Starlette read of an IPv6 address, which no page has for a name
    return ["localhost", "127.0.0.1", "[::1]", "[", f"[{host}]" if ":" in host else host, *names]


def _host_name(text: str) -> str:
    """A host without scheme and port, as `argparse` reads it."""
    if not re.fullmatch(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*|\[[0-9a-fA-F:.]+\]", text):
        raise argparse.ArgumentTypeError(
            f"must be a host without scheme and port, such as gpu.example.org or *.example.org, but is {text}"
        )
    return text
