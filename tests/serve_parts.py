"""What the tests of `videollama serve` and `videollama ui` share: a model with readable answers, media, a host."""

import base64
import contextlib
import itertools
import json
import shutil
import ssl
import string
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import soundfile
from media_files import tone, write_damaged_image, write_media
from PIL import Image

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.chat_templates import CHAT_TEMPLATES

REFERENCE_FILES = Path(__file__).parent / "reference"
SYNTH = REFERENCE_FILES / "synth"
CERTIFICATE = REFERENCE_FILES / "localhost.pem"
"""Of a host named localhost, with its key; signed by itself."""


def make_readable(source: Path, target: Path) -> Path:
    """
    A copy of the tiny model with the published prompt, which answers in small letters and blanks, and ends no answer
    by itself. Its own tokens are bytes, which seldom make text.
    """
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    for code in range(0x20, 0x7F):
        vocab[chr(code).replace(" ", "▁")] = vocab.pop(f"<0x{code:02X}>")
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATES["vicuna"])
    generation = json.loads((target / "generation_config.json").read_text())
    letters = {vocab[letter] for letter in "▁" + string.ascii_lowercase}
    generation["suppress_tokens"] = [token for token in range(270) if token not in letters]
    (target / "generation_config.json").write_text(json.dumps(generation))
    return target


def until(condition: Callable[[], bool]) -> None:
    """Waits for what is going to be."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Reference:
    """The same model in this process, which answers one chat at a time."""

    def __init__(self, folder: Path):
        self.model = VideoLlamaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = VideoLlamaProcessor.from_pretrained(folder)

    def inputs(self, messages: list[dict[str, Any]]) -> Any:
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def answer(self, messages: list[dict[str, Any]], max_new_tokens: int = 12) -> tuple[str, int]:
        """The answer and the number of the prompt's tokens."""
        inputs = self.inputs(messages)
        num_tokens = inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.post_process_image_text_to_text(output[0, num_tokens:]), num_tokens


def write_files(folder: Path) -> Path:
    """A folder with media of each kind, and with some that are damaged."""
    folder.mkdir()
    for name in ("clip.mp4", "clip_silent.mp4"):
        shutil.copy(SYNTH / name, folder / name)
    soundfile.write(folder / "tone.wav", tone(1.0).T, 44100)
    write_media(folder / "tone.mp3", num_frames=0, audio=tone(1.0), audio_codec="libmp3lame")
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save(folder / "picture.png")
    write_media(folder / "long.mp4", num_frames=80)  # 8 seconds
    for name in ("damaged.png", "cut.jpg"):
        write_damaged_image(folder / name)
    for whole, name in (("clip.mp4", "broken.mp4"), ("tone.wav", "broken.wav")):
        (folder / name).write_bytes((folder / whole).read_bytes()[:20])
    return folder


def data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


class MediaHost:
    """
    A host at a loopback address, or one named localhost with TLS, that has the files of a folder. `/held/NAME` waits
    for `release()`; `/redirect?to=URL` goes elsewhere; `/endless` does not end; `/drip` is slow, as is the header of
    `/slow-header`; `/cut` ends early.
    """

    def __init__(self, folder: Path, has_tls: bool = False):
        self.folder = folder
        self.requests: list[str] = []
        self._is_released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        if has_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = f"https://localhost:{self.port}"

    def __enter__(self) -> "MediaHost":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def hold(self) -> None:
        self._is_released.clear()

    def release(self) -> None:
        self._is_released.set()

    def wait(self) -> None:
        self._is_released.wait(120)


def _handler_for(host: MediaHost) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            host.requests.append(self.path)
            with contextlib.suppress(OSError):  # whoever asked has had enough
                self.reply()

        def reply(self) -> None:
            parts = urlsplit(self.path)
            name = parts.path.removeprefix("/held").strip("/")
            if parts.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", parse_qs(parts.query)["to"][0])
                self.end_headers()
            elif parts.path == "/slow-header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                self.drip(b"X-Padding: 1\r\n")
            elif parts.path == "/drip":
                self.send_response(200)
                self.end_headers()
                self.drip(b"0123456789")
            elif parts.path == "/endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(bytes(2**16))
            elif parts.path == "/cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"0123456789")
            elif (host.folder / name).is_file():
                if parts.path.startswith("/held"):
                    host.wait()
                self.send_response(200)
                self.end_headers()
                self.wfile.write((host.folder / name).read_bytes())
            else:
                self.send_error(404)

        def drip(self, text: bytes) -> None:
            for position in itertools.count():
                self.wfile.write(text[position % len(text) :][:1])
                time.sleep(0.02)

    return Handler
