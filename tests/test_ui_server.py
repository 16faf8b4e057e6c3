"""What the page's server does with files that go while they are asked for; no browser is needed to see it."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import FileResponse

from transformers_videollama.ui.server import _Guard


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
    asyncio.run(_Guard(app)(scope, receive, send))
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
