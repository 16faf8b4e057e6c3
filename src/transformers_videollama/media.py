"""Media files: from a path, an address or bytes to the few frames and the sound that the model is shown.

The first step of the flow: the video processor calls `read_video`, the processor and the feature extractor call
`read_audio`. Nothing here knows about the model.

A video is read in three steps, of which only the last one scales and keeps pictures:

1. *index*: the packets are listed without decoding them, which gives the true number of frames and where to seek;
2. *check*: the wanted frames are decoded by PyAV, which reports damage;
3. *frames*: decord, where it is installed and known to be right for the kind of file, gives the same frames scaled.
   Elsewhere PyAV scales the frames of step 2, with the same arithmetic (libswscale's bilinear scaling).

Decord alone would not do: it hides damaged frames, and gives wrong ones for some containers (MPEG-TS, MPEG-PS).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib.util
import io
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
import torch
from transformers.utils import logging
from transformers.video_utils import VideoMetadata


if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.get_logger(__name__)

MediaSource = Union[str, os.PathLike, bytes, bytearray, memoryview, BinaryIO]

MAX_DOWNLOAD_BYTES = 4 * 2**30
DOWNLOAD_TIMEOUT_SECONDS = 30.0  # without any byte arriving
_CHUNK_BYTES = 2**20

# The containers that are opened at all. Playlists (HLS, DASH, concat, SDP, …) are left out on purpose: they are texts
# that name other files and hosts, which a media file from elsewhere has no business opening.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,gif,apng,asf,dv,mxf,"
    "nut,ogg,rm,wtv,yuv4mpegpipe,wav,w64,mp3,flac,aac,aiff,amr,au,caf,ac3,eac3,opus,tta,wv,ape"
)
# Where decord gives exactly the frames that it is asked for
_DECORD_CONTAINERS = {"mov", "matroska"}
# Seeking forward pays only when it skips more frames than a decoder holds back
_MIN_SKIPPED_FRAMES = 24


class MediaError(ValueError):
    """A media file cannot be used. The message names the file, what is wrong with it, and what to do."""


class _IndexMismatch(Exception):
    """The decoder gives other frames than the packets promise; the frames have to be counted by decoding them."""


@dataclass
class _OpenMedia:
    """A source as something that decoders open: a local file, or bytes in memory. `name` is for error messages."""

    name: str
    path: str | None = None
    data: bytes | None = None

    @contextlib.contextmanager
    def container(self) -> Iterator[InputContainer]:
        """Open with PyAV; every error of FFmpeg inside the block becomes a `MediaError`."""
        import av

        try:
            with av.open(
                self.path if self.path is not None else io.BytesIO(self.data or b""),
                metadata_errors="replace",
                options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"},
            ) as container:
                yield container
        except av.error.InvalidDataError as error:
            raise MediaError(
                f"{self.name} cannot be read: it is no media file, or its header is missing or damaged (an incomplete"
                f" download?). FFmpeg says: {error.strerror}."
            ) from error
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{self.name} cannot be read: {error.strerror or error}.") from error


@contextlib.contextmanager
def open_media(source: MediaSource) -> Iterator[_OpenMedia]:
    """Make a source readable for the duration of a `with` block.

    Args:
        source: a path, an `http(s)://` address (fetched to a temporary file, which is removed at the end), a `data:`
            URI, the bytes of a file, or a binary file object.

    Raises:
        MediaError: no such file, an empty one, another scheme than http(s), a failed or too large download.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield _from_bytes(bytes(source), "the given bytes")
    elif isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if isinstance(text, bytes):
            text = os.fsdecode(text)
        scheme = urllib.parse.urlsplit(text).scheme.lower() if "://" in text else ""
        if text.startswith("data:"):
            yield _from_bytes(_decode_data_uri(text), f"{text[:40]}…")
        elif scheme in ("http", "https"):
            with tempfile.TemporaryDirectory(prefix="videollama-") as folder:
                path = os.path.join(folder, "download" + os.path.splitext(urllib.parse.urlsplit(text).path)[1][:8])
                _download(text, path)
                yield _from_path(path, text)
        elif scheme:
            raise MediaError(
                f"{text} cannot be opened: only http:// and https:// addresses are, not {scheme}://. Give local files"
                " by their path."
            )
        else:
            yield _from_path(text, text)
    elif hasattr(source, "read"):
        yield _from_bytes(source.read(), str(getattr(source, "name", "the given file object")))
    else:
        raise TypeError(
            "A media source is a path, an http(s) address, a data: URI, bytes or a binary file object, not"
            f" {type(source).__name__}."
        )


def _from_bytes(data: bytes, name: str) -> _OpenMedia:
    if not data:
        raise MediaError(f"{name} cannot be read: there are no bytes in it.")
    return _OpenMedia(name, data=data)


def _from_path(path: str, name: str) -> _OpenMedia:
    if not os.path.exists(path):
        raise MediaError(f"{name} does not exist (looked for it from {os.getcwd()}).")
    if os.path.isdir(path):
        raise MediaError(f"{name} is a folder, a media file is needed.")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise MediaError(f"{name} is empty (0 bytes); was it downloaded completely?")
    # An absolute path: FFmpeg takes what stands before a colon in a relative one for a protocol
    return _OpenMedia(name, path=os.path.abspath(path))


def _decode_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise MediaError(f"{uri[:40]}… is no data: URI: there is no comma between its header and its data.")
    if not header.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{uri[:40]}… does not hold valid base64: {error}.") from error


class _HttpOnlyRedirects(urllib.request.HTTPRedirectHandler):
    """The standard library's handler would also follow a redirect to ftp://."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.URLError(f"it redirects to {newurl}, which is no http(s) address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, path: str) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "transformers_videollama"})
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _HttpOnlyRedirects,
    ):
        opener.add_handler(handler())
    received = 0
    try:
        with opener.open(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response, open(path, "wb") as file:
            expected = response.headers.get("Content-Length")
            while chunk := response.read(_CHUNK_BYTES):
                received += len(chunk)
                if received > MAX_DOWNLOAD_BYTES:
                    raise MediaError(
                        f"{url} is larger than the {MAX_DOWNLOAD_BYTES / 2**30:g} GiB that are fetched at most;"
                        " download it yourself and give its path."
                    )
                file.write(chunk)
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors, a malformed address a ValueError
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{url} cannot be fetched: {getattr(error, 'reason', None) or error}.") from error
    if expected is not None and received < int(expected):
        raise MediaError(f"{url} cannot be fetched: the connection ended after {received} of {expected} bytes.")


# ---------------------------------------------------------------------------------------------------------------------
# Which frames


def uniform_frame_indices(total_num_frames: int, num_frames: int) -> list[int]:
    """The published system's frames for inference and instruction tuning: `arange(0, len, len / n)` truncated.

    Args:
        total_num_frames: length of the video in frames.
        num_frames: how many are wanted; a shorter video gives all of its frames.

    Returns:
        At most `num_frames` increasing indices.
    """
    count = min(num_frames, total_num_frames)
    return np.arange(0, total_num_frames, total_num_frames / count).astype(int)[:count].tolist()


def headtail_frame_indices(
    total_num_frames: int, num_frames: int, generator: torch.Generator | None = None
) -> list[int]:
    """The published system's frames for pre-training: half drawn from each half of the video, without replacement.

    Args:
        total_num_frames: length of the video in frames.
        num_frames: how many are wanted; a shorter video gives all of its frames.
        generator: where the randomness comes from; torch's global generator by default, which data loaders seed
            differently in each worker and each epoch.

    Returns:
        Increasing indices. Of an odd number the larger part is drawn from the second half.
    """
    count = min(num_frames, total_num_frames)
    middle, head = total_num_frames // 2, count // 2
    first = torch.randperm(middle, generator=generator)[:head]
    second = middle + torch.randperm(total_num_frames - middle, generator=generator)[: count - head]
    return torch.cat([first, second]).sort().values.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Video


@dataclass
class _VideoIndex:
    """What the packets of the video track tell before any of them is decoded.

    `times` are the presentation times of the frames in units of the track's time base, increasing: the frame number
    `i` is the one shown at `times[i]`. None where the file does not give every frame its own time; then frames are
    counted while decoding. `key_times` are those at which decoding can start. `complete_until` is the last time up to
    which the numbering is certain in a file that was cut off.
    """

    num_frames: int
    times: np.ndarray | None
    key_times: np.ndarray
    complete_until: int | None
    fps: float
    width: int
    height: int
    decord_is_right: bool

    def seconds(self, frame_index: int) -> float:
        return frame_index / self.fps


def _video_stream(container: InputContainer, media: _OpenMedia) -> VideoStream:
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        if container.streams.audio:
            raise MediaError(f"{media.name} has sound but no video. Give it as audio instead.")
        raise MediaError(f"{media.name} has no video track.")
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _index_video(media: _OpenMedia) -> _VideoIndex:
    import av

    times, key_times = array("q"), array("q")
    timed = intact = True
    num_frames = num_trimmed = 0
    last_decode_time = None
    end_seconds = 0.0
    with media.container() as container:
        stream = _video_stream(container, media)
        packets = container.demux()
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.EOFError):
                break
            except av.error.FFmpegError:  # the rest of the file cannot be parsed
                intact = False
                break
            if packet.size == 0:
                continue
            if packet.pts is not None:
                end_seconds = max(end_seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:  # only a part of it is in the file
                intact = False
                continue
            if packet.is_discard:  # before the start that the file's edit list sets
                num_trimmed += 1
                continue
            num_frames += 1
            if packet.pts is None:
                timed = False
                continue
            times.append(packet.pts)
            if packet.is_keyframe:
                key_times.append(packet.pts)
            if packet.dts is not None:
                last_decode_time = packet.dts
        if num_frames == 0:
            raise MediaError(f"{media.name} has a video track without a complete frame in it.")
        container_name = container.format.name.split(",")[0]
        # Only MP4 lists its frames apart from their data, so that missing ones are known
        num_missing = stream.frames - num_frames - num_trimmed if container_name == "mov" else 0
        if num_missing <= 0 and container.duration:
            stated, found = container.duration / av.time_base, end_seconds - (container.start_time or 0) / av.time_base
            if found < 0.9 * stated - 1:
                logger.warning(
                    f"{media.name} says that it lasts {stated:.1f} s but ends after {found:.1f} s; it is probably cut"
                    " off. What is there is used."
                )
        sorted_times = np.sort(np.frombuffer(times, dtype=np.int64))
        if not timed or (np.diff(sorted_times) == 0).any():
            sorted_times = None
        rate = stream.average_rate if timed else stream.guessed_rate or stream.average_rate
        fps = float(rate) if rate else 0.0
        if not fps and sorted_times is not None and num_frames > 1:
            fps = float((num_frames - 1) / ((sorted_times[-1] - sorted_times[0]) * stream.time_base))
        return _VideoIndex(
            num_frames=num_frames + max(num_missing, 0),
            times=sorted_times,
            key_times=np.sort(np.frombuffer(key_times, dtype=np.int64)),
            complete_until=last_decode_time if num_missing > 0 else None,
            fps=fps or 25.0,  # what FFmpeg, too, assumes where nothing in the file tells
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            decord_is_right=container_name in _DECORD_CONTAINERS
            and sorted_times is not None
            and intact
            and num_missing <= 0
            and num_trimmed == 0,
        )


def _decode(
    media: _OpenMedia, index: _VideoIndex, wanted: list[int], seek: bool = True
) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames (increasing indices without repetition), decoded by PyAV one after the other.

    Raises:
        MediaError: a wanted frame, or one that it builds on, is damaged.
        _IndexMismatch: the decoder does not give the frames that the packets promise.
    """
    import av

    def error(frame_index: int, reason: str) -> MediaError:
        return MediaError(
            f"{media.name}: frame {frame_index} (at {index.seconds(frame_index):.1f} s) of {index.num_frames} cannot be"
            f" decoded, {reason}. Repair or replace the file."
        )

    with media.container() as container:
        stream = _video_stream(container, media)
        stream.thread_type = "AUTO"
        queue = list(reversed(wanted))
        number = 0  # of the next frame, where frames are counted
        damaged = False  # since the last frame that builds on no other
        while queue:
            target = index.times[queue[-1]] if index.times is not None else None
            start = index.key_before(target) if seek and target is not None else None
            if start is not None:
                container.seek(int(start), stream=stream)
                damaged = False
            feeding = start is None
            for packet in container.demux(stream):
                # Seeking may land earlier than asked for; what comes before the key frame is not needed
                feeding = feeding or packet.pts == start
                if not feeding:
                    continue
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    damaged = True
                    continue
                for frame in frames:
                    ...
