"""The process's side of the page: HTTP, what browsers may load, and what is printed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .page import CSS, HEAD, THEME
from .visitors import Visitors

# A page that talks about somebody's video has no reason to load anything from elsewhere
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)
_FILE = "/gradio_api/file="
_FETCHING = (f"{_FILE}http:", f"{_FILE}https:", "/gradio_api/proxy=")
_STREAM = "/gradio_api/queue/data"
_UPLOAD = "/gradio_api/upload"
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
]


class PageServer(uvicorn.Server):
    """
    Serves a page, and says where.

    Args:
        page (`gr.Blocks`): The page.
        listener (`socket.socket`): Is bound to the address.
        max_bytes (`int`): The largest upload.
        allowed_hosts (`Sequence[str]`): The hosts that requests may name. Gradio itself answers any.
        visitors ([`Visitors`]): Whose uploads these are.
    """

    def __init__(
        self,
        page: gr.Blocks,
        listener: socket.socket,
        max_bytes: int,
        allowed_hosts: Sequence[str],
        visitors: Visitors,
    ):
        host, port = listener.getsockname()[:2]
        app = gr.mount_gradio_app(
            FastAPI(openapi_url=None),
            page,
            "/",
            server_name=host,
            server_port=port,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=max_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=THEME,
            css=CSS,
            head=HEAD,
        )
        self._stop_event = app.routes[-1].app.stop_event
        self._guard = _Guard(_OpenStreams(app), visitors)
        guarded = TrustedHostMiddleware(self._guard, allowed_hosts, www_redirect=False)
        super().__init__(
            uvicorn.Config(guarded, log_level="error", ws="none", server_header=False, timeout_graceful_shutdown=5)
        )
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stop_event.set()  # each open page holds a connection, which Gradio ends at this
        await self._guard.end(timeout=1)  # those that wait for an answer, it does not
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"The page is at {self.url}", flush=True)


class _Guard:
    """
    Adds headers to each response, refuses to fetch other servers' files, which Gradio would do for anyone, removes
    what was uploaded and never opened before the next upload, and ends the responses that are under way when the
    server does, or whose file is removed because its visitor has left.
    """

    def __init__(self, app: Any, visitors: Visitors):
        self.app = app
        self.visitors = visitors
        self._responding: set[asyncio.Task[Any]] = set()
        self._is_ending = False

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_begun = is_complete = False

        async def send_with_headers(message: dict[str, Any]) -> None:
            nonlocal is_begun, is_complete
            if message["type"] == "http.response.start":
                is_begun = True
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def refuse(status: int) -> None:
            await send_with_headers({"type": "http.response.start", "status": status})
            await send_with_headers({"type": "http.response.body"})

        if scope["path"].lower().startswith(_FETCHING):
            await refuse(404)
            return
        if scope["path"] == _UPLOAD:
            self.visitors.remove_forgotten()
        task = asyncio.current_task()
        assert task is not None
        self._responding.add(task)
        try:
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            if not self._is_ending:
                raise
            if not is_begun:
                await refuse(503)
            elif not is_complete:
                await send({"type": "http.response.body"})
        except (FileNotFoundError, RuntimeError):  # Starlette's, by whether it looks for the file or opens it
            path = scope["path"]
            if not path.startswith(_FILE) or Path(path.removeprefix(_FILE)).exists():
                raise
            if not is_begun:
                await refuse(404)
        finally:
            self._responding.discard(task)

    async def end(self, timeout: float) -> None:
        """Ends the responses that are not complete after so many seconds, and gives them as many to end."""
        self._is_ending = True
        if self._responding:
            _, open_ = await asyncio.wait(self._responding, timeout=timeout)
            for task in open_:
                task.cancel()
            if open_:
                await asyncio.wait(open_, timeout=timeout)


class _OpenStreams:
    """
    Keeps the stream on which a page receives the answers to its events open until the page is closed. Gradio ends it
    each time when everything is answered; an event that the page sends before it has read of that end would never be
    answered, because the page opens no other stream for it.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != _STREAM:
            await self.app(scope, receive, send)
            return
        is_begun = False
        is_ended = True

        async def send_on(message: dict[str, Any]) -> None:
            nonlocal is_begun, is_ended
            if message["type"] == "http.response.start":
                if is_begun:
                    return
                is_begun = True
            is_ended = is_ended or b'"msg":"close_stream"' in message.get("body", b"")
            if not is_ended:
                await send(message)

        while is_ended:
            is_ended = False
            await self.app(scope, receive, send_on)
