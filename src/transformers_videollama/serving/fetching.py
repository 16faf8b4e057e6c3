"""Brings the media of a request, which come from people one does not know, to files on this machine.

Addresses are followed to the public internet only: a name is resolved once, every address that it has is checked, and
the connection goes to one of those very addresses, so that a name that changes its address in between gains nothing.
Each redirect is checked like the first address. Size and time are limited as the bytes come, whatever headers say.
Local files are given from one folder only, and only if there is one.
"""

import contextlib
import http.client
import ipaddress
import mimetypes
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from ..media import decode_data_uri, describe_source
from .errors import RequestError

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 2**18
_WATCH_SECONDS = 0.2
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
TOO_LARGE = "media_too_large"
_HEADERS = {"User-Agent": "transformers_videollama", "Accept-Encoding": "identity", "Connection": "close"}


class Cancelled(Exception):
    """Nobody waits for the file any longer."""


@dataclass(frozen=True)
class FetchRules:
    """
    What may be fetched.

    Attributes:
        max_bytes (`int`): The largest file.
        max_seconds (`float`): The longest time for all files of a request.
        local_folder (`Path`, *optional*): The folder, resolved, whose files may be named.
        allow_private_addresses (`bool`): Whether addresses that are not public ones may be fetched.
    """

    max_bytes: int
    max_seconds: float
    local_folder: Path | None = None
    allow_private_addresses: bool = False


class Fetcher:
    """
    Fetches the media of one request.

    Args:
        rules ([`FetchRules`]): What may be fetched.
        folder (`Path`): Where files are put.
        is_cancelled (`Callable[[], bool]`, *optional*): Is asked again and again meanwhile.
    """

    def __init__(self, rules: FetchRules, folder: Path, is_cancelled: Callable[[], bool] = lambda: False):
        self.rules = rules
        self.folder = folder
        self.is_cancelled = is_cancelled
        self._end = time.monotonic() + rules.max_seconds
        self._num_files = 0

    def fetch(self, url: str) -> Path:
        """
        Brings one file.

        Args:
            url (`str`): An `http:`, `https:` or `data:` address; a path or a `file:` address if there is a folder.

        Returns:
            `Path`: a new file in the folder, or the local file itself.

        Raises:
            RequestError: 400 if it is not allowed or cannot be fetched, 413 if it is too large.
            Cancelled: if it was.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            data = decode_data_uri("data" + url[4:])
            self._check_size(len(data), "the file in a data: URL")
            path = self._new_path(mimetypes.guess_extension(url[5:].partition(",")[0].partition(";")[0]) or "")
            path.write_bytes(data)
            return path
        if scheme in ("http", "https"):
            return self._download(url)
        if scheme != "file" and "://" in url:
            raise _refused(f"{url:.200} has another scheme than http:, https: and data:.")
        return self._find_local_file(url)

    def _new_path(self, suffix: str) -> Path:
        """For a file of such a suffix, which tells the kind of some files without a header."""
        self._num_files += 1
        return self.folder / f"{self._num_files}{suffix if suffix[1:].isalnum() and len(suffix) < 8 else ''}"

    def _find_local_file(self, url: str) -> Path:
        folder = self.rules.local_folder
        if folder is None:
            raise _refused(
                f"{url:.200} is a local file, which this server does not open: send an http(s) or data: URL."
            )
        name = url
        if url.lower().startswith("file:"):
            parts = urlsplit(url)
            name = unquote(parts.path) if parts.netloc in ("", "localhost") else ""
        try:
            path = (folder / name).resolve(strict=True) if name else folder
        except (OSError, RuntimeError, ValueError):  # not there, a circle of links, a name that no file can have
            path = folder
        # The same words whether there is no such file or it lies elsewhere, which is nobody's business
        if not path.is_relative_to(folder) or not path.is_file():
            raise _refused(f"{url:.200} is no file in the folder whose files this server opens.")
        self._check_size(path.stat().st_size, url)
        return path

    def _download(self, url: str) -> Path:
        address = url
        for _ in range(1 + MAX_REDIRECTS):
            try:
                with self._open(address) as response:
                    if response.status in _REDIRECTS and response.headers.get("Location"):
                        address = urljoin(address, response.headers["Location"])
                        continue
                    if response.status != 200:
                        raise _failed(url, f"its server answers {response.status} {response.reason}")
                    path = self._new_path(PurePosixPath(urlsplit(address).path).suffix)
                    self._save(response, path, url)
                    return path
            except (OSError, ValueError, http.client.HTTPException) as error:
                self._check_time(url)
                raise _failed(url, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
        raise _failed(url, f"it redirects more than {MAX_REDIRECTS} times")

    @contextlib.contextmanager
    def _open(self, url: str) -> Generator[http.client.HTTPResponse]:
        """The response to one request, without following redirects. The connection ends when the time does."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _refused(f"{describe_source(url):.200} is no address that is fetched: http(s)://HOST/… is needed.")
        if parts.username is not None or parts.password is not None:
            raise _refused("An address with a user name in it is not fetched.")
        is_https = parts.scheme == "https"
        port = parts.port or (443 if is_https else 80)
        sock = self._connect(parts.hostname, port)
        if is_https:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
        is_done = threading.Event()
        threading.Thread(target=self._watch, args=(sock, is_done), daemon=True).start()
        kind = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
        connection = kind(parts.hostname, port)
        connection.sock = sock
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection.request("GET", _request_target(parts), headers=_HEADERS)
            with connection.getresponse() as response:
                yield response
        finally:
            is_done.set()
            connection.close()

    def _watch(self, sock: socket.socket, is_done: threading.Event) -> None:
        """Ends a connection when the time does or nobody waits; a socket's own timeout begins anew with each byte."""
        while not is_done.wait(_WATCH_SECONDS):
            if self.is_cancelled() or time.monotonic() >= self._end:
                with contextlib.suppress(OSError):  # it has ended already
                    # An SSL socket's own method would take its state from the thread that reads it
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _connect(self, host: str, port: int) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not self.rules.allow_private_addresses and not all(is_public(entry[4][0]) for entry in found):
            raise _refused(
                f"{host} has a private, local or reserved address, which this server does not fetch from: send the "
                "file itself in a data: URL."
            )
        error: OSError = OSError("it has no address")
        for family, kind, protocol, _, address in found:
            seconds = self._end - time.monotonic()
            if seconds <= 0:
                break
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(seconds)
            try:
                sock.connect(address)
                return sock
            except OSError as reason:
                sock.close()
                error = reason
        raise error

    def _save(self, response: http.client.HTTPResponse, path: Path, url: str) -> None:
        expected, received = response.length, 0
        self._check_size(expected or 0, url)
        with path.open("wb") as file:
            while chunk := response.read1(_CHUNK_BYTES):
                received += len(chunk)
                self._check_size(received, url)
                self._check_time(url)
                file.write(chunk)
        self._check_time(url)
        if expected is not None and received < expected:
            raise _failed(url, f"the connection ended after {received} of {expected} bytes")

    def _check_size(self, num_bytes: int, url: str) -> None:
        if num_bytes > self.rules.max_bytes:
            raise RequestError(
                413, f"{url:.200} is larger than the {self.rules.max_bytes} bytes of the largest file.", code=TOO_LARGE
            )

    def _check_time(self, url: str) -> None:
        if self.is_cancelled():
            raise Cancelled
        if time.monotonic() >= self._end:
            raise _failed(url, f"it takes more than the {self.rules.max_seconds:g} seconds for the files of a request")


def is_public(address: str) -> bool:
    """
    Whether an address is one of the public internet: not private, loopback, link-local, multicast, reserved or without
    meaning. An IPv6 address that stands for an IPv4 address is judged by that; those of tunnels (6to4, Teredo) are not
    public.

    Args:
        address (`str`): An IPv4 or IPv6 address, which may have a zone (`fe80::1%eth0`).
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) % 2**32)))
        if ip.sixtofour is not None or ip.teredo is not None or ip not in _GLOBAL_IPV6:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _request_target(parts: SplitResult) -> str:
    target = quote(parts.path or "/", safe="%/:@!$&'()*+,;=~-._")
    return f"{target}?{quote(parts.query, safe='%/:?@!$&()*+,;=~-._[]')}" if parts.query else target


def _refused(message: str) -> RequestError:
    return RequestError(400, message, code="media_not_allowed")


def _failed(url: str, reason: str) -> RequestError:
    return RequestError(400, f"{url:.200} cannot be fetched: {reason}.", code="media_not_fetched")
