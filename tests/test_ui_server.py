"""What the page's server does, as far as it is seen without a browser: files that go, streams that stay."""

import asyncio
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import gradio as gr
import httpx
import pytest
from gradio.processing_utils import async_move_files_to_cache
from serve_parts import until
from starlette.responses import FileResponse

from transformers_videollama.ui.events import PageEvents
from transformers_videollama.ui.page import make_page
from transformers_videollama.ui.server import PageServer, _Guard
from transformers_videollama.ui.visitors import PATIENCE, Medium, Visitors


def _get(app: Any, path: Path, **headers: str) -> list[dict[str, Any]]:
    """What is sent to somebody who asks a guarded app for a file."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.4"},
        "method": "GET",
        "path": f"/gradio_api/file={path}",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(_Guard(app, Visitors(path.parent))(scope, receive, send))
    return sent


def test_a_file_that_is_removed_before_it_is_looked_for_is_not_found(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    started, _ = _get(FileResponse(path), path)
    assert started["status"] == 404


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}])
def test_a_response_whose_file_is_removed_is_broken_off(tmp_path: Path, headers: dict[str, str]) -> None:
    """Its length was announced, so an end of it would be a lie: the server closes the connection."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(bytes(10))
    response = FileResponse(path, stat_result=os.stat(path))
    path.unlink()
    assert [message["type"] for message in _get(response, path, **headers)] == ["http.response.start"]


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.touch()

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        _get(fail, path)


def test_addresses_are_not_fetched() -> None:
    """Which Gradio does for whatever an event names, into memory and however large the file."""
    events = MagicMock(spec=PageEvents, hears=True)
    page = make_page(events, [], title="tiny", limits="", max_new_tokens=8, temperature=0.0, top_p=0.9, listens=True)
    payload = {"path": "http://example.org/huge.mp4", "meta": {"_type": "gradio.FileData"}}
    for block in page.blocks.values():
        with pytest.raises(gr.Error, match="not fetched"):
            asyncio.run(async_move_files_to_cache([payload], block, check_in_upload_folder=True))


def test_uploads_that_nobody_opens_are_removed(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    paths = [uploads / name / "clip.mp4" for name in ("forgotten", "opened", "new")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
    (uploads / "incomplete").touch()
    for path in paths[:2]:
        os.utime(path.parent, (0, 0))
    visitors = Visitors(uploads)
    visitors.give(visitors["somebody"], Medium("video", paths[1]))
    visitors.remove_forgotten()
    assert [path.exists() for path in paths] == [False, True, True] and (uploads / "incomplete").exists()


def test_uploads_do_not_outlive_a_visitor_who_leaves_while_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name / "clip.mp4" for name in ("under way", "last event")]
    for path in paths:
        path.parent.mkdir()
        path.touch()
        os.utime(path.parent, (0, 0))
    visitors = Visitors(tmp_path)
    visitor = visitors["somebody"]
    visitors.leave("somebody")
    visitors.give(visitor, Medium("video", paths[0]))
    assert [path.exists() for path in paths] == [False, True]
    visitors.give(visitors["somebody"], Medium("video", paths[1]))
    visitors.remove_forgotten()  # the same page may have come back
    assert paths[1].exists()
    later = time.time() + PATIENCE + 1
    monkeypatch.setattr("time.time", lambda: later)
    visitors.remove_forgotten()
    assert not paths[1].exists()


def test_a_stream_stays_open_when_all_is_answered(tmp_path: Path) -> None:
    """Or else a page that sends its next event at that moment would wait for ever."""
    with gr.Blocks() as page:
        text = gr.Textbox()
        text.change(lambda value: value.upper(), text, text)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = PageServer(page.queue(), listener, 2**20, ["127.0.0.1"], Visitors(tmp_path))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started)
            with httpx.Client(base_url=f"{server.url}/gradio_api/queue", timeout=60) as client:

                def ask(value: str) -> None:
                    event = {"data": [value], "fn_index": 0, "session_hash": "somebody"}
                    client.post("join", json=event).raise_for_status()

                ask("first")
                with client.stream("GET", "data", params={"session_hash": "somebody"}) as stream:
                    assert stream.status_code == 200
                    answers = []
                    for line in stream.iter_lines():
                        message = json.loads(line.removeprefix("data: ") or "{}")
                        assert message.get("msg") != "close_stream"
                        if message.get("msg") == "process_completed":
                            answers += message["output"]["data"]
                            if len(answers) == 3:
                                break
                            ask("second" if len(answers) == 1 else "third")
        finally:
            server.should_exit = True
            thread.join(60)
    assert answers == ["FIRST", "SECOND", "THIRD"] and not thread.is_alive()
