"""How `videollama serve` fetches media: from a real HTTP server, within limits, and only from where it may."""

import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_parts import CERTIFICATE, MediaHost, data_url, write_files

from transformers_videollama.serving import fetching
from transformers_videollama.serving.errors import RequestError
from transformers_videollama.serving.fetching import Cancelled, Fetcher, FetchRules, is_public
from transformers_videollama.serving.media_limits import check_media

pytestmark = pytest.mark.xdist_group("serve_fetching")
MAX_BYTES = 2**20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("media") / "files")


@pytest.fixture(scope="module")
def host(files: Path) -> Iterator[MediaHost]:
    with MediaHost(files) as host:
        yield host


def fetcher(folder: Path, seconds: float = 60, **rules: Any) -> Fetcher:
    return Fetcher(FetchRules(max_bytes=MAX_BYTES, max_seconds=seconds, **rules), folder)


def refusal(fetcher: Fetcher, url: str) -> RequestError:
    with pytest.raises(RequestError) as raised:
        fetcher.fetch(url)
    return raised.value


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("64:ff9b::5db8:d70e", True),  # 93.184.215.14 behind NAT64
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds tell machines their secrets
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("198.18.0.1", False),
        ("192.0.2.1", False),
        ("::1", False),
        ("::", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:192.168.1.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
    ],
)
def test_public_addresses(address: str, is_allowed: bool) -> None:
    assert is_public(address) == is_allowed


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"])
def test_private_hosts_are_refused_however_they_are_written(name: str, host: MediaHost, tmp_path: Path) -> None:
    host.requests.clear()
    error = refusal(fetcher(tmp_path), f"http://{name}:{host.port}/clip.mp4")
    assert (
        error.status == 400
        and error.code == "media_not_allowed"
        and "127" not in str(error).replace(name.strip("[]"), "")
    )
    assert not host.requests and not list(tmp_path.iterdir())


def test_a_file_is_fetched_whole(host: MediaHost, files: Path, tmp_path: Path) -> None:
    fetch = fetcher(tmp_path, allow_private_addresses=True).fetch
    wanted = (files / "clip.mp4").read_bytes()
    for url in (
        f"{host.url}/clip.mp4",
        f"HTTP://localhost:{host.port}/clip.mp4?a=b c",
        f"{host.url}/redirect?to=/redirect?to=/clip.mp4",
        data_url(files / "clip.mp4", "video/mp4"),
    ):
        path = fetch(url)
        assert path.parent == tmp_path and path.suffix == ".mp4" and path.read_bytes() == wanted


def test_https(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MediaHost(files, has_tls=True) as host:
        allowed = fetcher(tmp_path, allow_private_addresses=True)
        assert "certificate" in str(refusal(allowed, f"{host.url}/clip.mp4")).lower()
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert allowed.fetch(f"{host.url}/clip.mp4").read_bytes() == (files / "clip.mp4").read_bytes()
        another_name = f"https://127.0.0.1:{host.port}/clip.mp4"
        assert "certificate" in str(refusal(allowed, another_name)).lower()
        slow = fetcher(tmp_path, 0.5, allow_private_addresses=True)
        assert "takes more than the 0.5 seconds" in str(refusal(slow, f"{host.url}/drip"))


@pytest.fixture
def only_one_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 127.0.0.1 were an address of the internet, and the rest of this machine's were what they are."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or is_public(address))


@pytest.mark.parametrize("to", ["http://127.0.0.2:{port}/clip.mp4", "http://0.0.0.0:{port}/", "file:///etc/hostname"])
def test_redirects_are_checked(to: str, host: MediaHost, tmp_path: Path, only_one_is_public: None) -> None:
    assert fetcher(tmp_path).fetch(f"{host.url}/clip.mp4").is_file()
    host.requests.clear()
    error = refusal(fetcher(tmp_path), f"{host.url}/redirect?to={to.format(port=host.port)}")
    assert error.code == "media_not_allowed"
    assert len(host.requests) == 1


def test_a_name_is_resolved_once(
    host: MediaHost, tmp_path: Path, only_one_is_public: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that changes its address after it was checked."""
    answers = ["127.0.0.1", "127.0.0.2"]

    def resolve(name: str, port: int, **_: Any) -> list[Any]:
        assert name == "rebinding.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert fetcher(tmp_path).fetch(f"http://rebinding.example:{host.port}/clip.mp4").is_file()
    assert answers == ["127.0.0.2"]
    assert refusal(fetcher(tmp_path), f"http://rebinding.example:{host.port}/clip.mp4").code == "media_not_allowed"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/endless", 413, "media_too_large"),
        ("/drip", 400, "media_not_fetched"),
        ("/slow-header", 400, "media_not_fetched"),
        ("/cut", 400, "media_not_fetched"),
        ("/absent.mp4", 400, "media_not_fetched"),
        ("/redirect?to=http://127.0.0.1:1/", 400, "media_not_fetched"),
        ("/redirect?to=http://user:word@127.0.0.1/", 400, "media_not_allowed"),
    ],
)
def test_what_cannot_be_fetched(path: str, status: int, code: str, host: MediaHost, tmp_path: Path) -> None:
    seconds = 0.5 if path in ("/drip", "/slow-header") else 60
    error = refusal(fetcher(tmp_path, seconds, allow_private_addresses=True), host.url + path)
    assert (error.status, error.code) == (status, code)
    assert ("takes more than the 0.5 seconds" in str(error)) == (seconds == 0.5)
    assert all(file.stat().st_size <= MAX_BYTES for file in tmp_path.iterdir())


def test_circles_of_redirects_end(host: MediaHost, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    handler = "/redirect?to=" * 8 + "/clip.mp4"
    error = refusal(fetcher(tmp_path / "media", allow_private_addresses=True), host.url + handler)
    assert "redirects more than 5 times" in str(error)


def test_nobody_waits_any_longer(host: MediaHost, tmp_path: Path) -> None:
    rules = FetchRules(max_bytes=10**9, max_seconds=60, allow_private_addresses=True)
    host.hold()
    for path in ("/endless", "/drip", "/held/clip.mp4"):
        with pytest.raises(Cancelled):
            Fetcher(rules, tmp_path, is_cancelled=lambda: True).fetch(host.url + path)


@pytest.mark.parametrize("url", ["data:video/mp4;base64,AAA", "data:video/mp4"])
def test_wrong_data_urls(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data:"):
        fetcher(tmp_path).fetch(url)


def test_data_urls_have_a_limit(tmp_path: Path) -> None:
    assert refusal(fetcher(tmp_path), "data:,".ljust(MAX_BYTES + 10, "x")).status == 413


def test_local_files_of_one_folder(files: Path, tmp_path: Path) -> None:
    folder, outside = tmp_path / "allowed", tmp_path / "outside.mp4"
    (folder / "inner").mkdir(parents=True)
    clip = folder / "inner" / "a clip.mp4"
    for path in (outside, clip):
        path.write_bytes((files / "clip.mp4").read_bytes())
    (folder / "link.mp4").symlink_to(outside)
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    (folder / "good_link.mp4").symlink_to(clip)
    allowed = fetcher(tmp_path, local_folder=folder.resolve())
    for url in (str(clip), "inner/a clip.mp4", f"file://{str(clip).replace(' ', '%20')}", "good_link.mp4"):
        assert allowed.fetch(url) == clip.resolve()
        assert refusal(fetcher(tmp_path), url).code == "media_not_allowed"
    messages = set()
    for url in (
        str(outside),
        "../outside.mp4",
        "inner/../../outside.mp4",
        "link.mp4",
        "circle.mp4",
        "absent.mp4",
        str(tmp_path / "absent.mp4"),
        "inner",
        "",
        "a\0b",
        f"file://elsewhere{clip}",
        "file:///etc/passwd",
        "/dev/zero",
    ):
        messages.add(str(refusal(allowed, url)).removeprefix(url))
    assert len(messages) == 1  # which does not tell what is where
    assert refusal(allowed, "ftp://example.org/a.mp4").code == "media_not_allowed"


@pytest.mark.parametrize(
    ("name", "kind", "seconds", "is_refused"),
    [
        ("long.mp4", "video", 7, True),
        ("long.mp4", "video", 9, False),
        ("tone.wav", "audio", 0.5, True),
        ("tone.wav", "audio", 2, False),
        ("picture.png", "image", 1, False),
    ],
)
def test_long_media(name: str, kind: str, seconds: float, is_refused: bool, files: Path) -> None:
    if not is_refused:
        check_media(kind, files / name, seconds)
        return
    with pytest.raises(RequestError) as raised:
        check_media(kind, files / name, seconds)
    assert raised.value.status == 413 and raised.value.code == "media_too_long"


def test_headers_that_lie(files: Path, tmp_path: Path) -> None:
    """A video whose header says that it is short, and a picture that says that it is huge."""
    data = bytearray((files / "long.mp4").read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):  # durations
        place = data.find(box) + offset
        data[place : place + 4] = (1).to_bytes(4, "big")
    elst = data.find(b"elst")
    data[elst : elst + 4] = b"free"
    (tmp_path / "short.mp4").write_bytes(data)
    with pytest.raises(RequestError) as raised:
        check_media("video", tmp_path / "short.mp4", 5)
    assert raised.value.code == "media_too_long"

    png = bytearray((files / "picture.png").read_bytes())
    png[16:24] = (30000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(png)
    with pytest.raises(RequestError) as raised:
        check_media("image", tmp_path / "huge.png", 5)
    assert raised.value.code == "media_too_large"
