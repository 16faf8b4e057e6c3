"""The process's side of the server: what it does when it begins to listen, and at signals."""

import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn

from .app import Service, make_app


class Server(uvicorn.Server):
    """
    Says where it listens. At SIGTERM and Ctrl-C it goes on listening, to refuse what is new with 503, until the
    requests that were taken are answered; at a second signal it stops at once.

    Args:
        service ([`Service`]): Answers the requests.
        listener (`socket.socket`): Is bound to the address.
        allowed_hosts (`Sequence[str]`): The hosts that requests may name.
    """

    def __init__(self, service: Service, listener: socket.socket, allowed_hosts: Sequence[str]):
        app = make_app(service, allowed_hosts)
        super().__init__(uvicorn.Config(app, lifespan="off", ws="none", server_header=False))
        self.service = service
        self.listener = listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{self.service.model_name} is served at http://{shown}:{port}/v1", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.is_draining:
            self.service.cancel()
            self.force_exit = True
            self._stop()
        else:
            self.service.drain(self._stop)

    def _stop(self) -> None:
        self.should_exit = True
