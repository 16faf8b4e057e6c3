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
import errno
import http.client
import importlib
import importlib.util
import io
import math
import os
import struct
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.get_logger(__name__)


MAX_DOWNLOAD_BYTES = 4 * 2**30
DOWNLOAD_TIMEOUT_SECONDS = 30.0  # without any byte arriving
_CHUNK_BYTES = 2**20

# The containers that are opened at all. Playlists (HLS, DASH, concat, SDP, …) are left out on purpose: they are texts
# that name other files and hosts, which a media file from elsewhere has no business opening.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,gif,apng,asf,dv,"
    "mxf,nut,ogg,rm,wtv,yuv4mpegpipe,wav,w64,mp3,flac,aac,aiff,amr,au,caf,ac3,eac3,opus,tta,wv,ape"
)
# Where decord gives exactly the frames that it is asked for
_DECORD_CONTAINERS = {"mov", "matroska"}
# Seeking forward pays only when it skips more frames than a decoder holds back
_MIN_SKIPPED_FRAMES = 24
# By how much a file may be shorter than its header says, and its sound than the sound's (encoders pad the end)
_MAX_MISSING_SECONDS = 0.1
_MAX_MISSING_SOUND_SECONDS = 0.5
_SKIP_SAMPLES = "<IIBB"  # FFmpeg's side data: samples to leave out at the start and at the end, and why

# By which a medium's kind is told from its name: not by the system's table of types, which is another one everywhere
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif")
VIDEO_ENDINGS = (
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv",
    ".3gp", ".3g2", ".ogv",
)  # fmt: skip
AUDIO_ENDINGS = (".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".wma", ".aiff", ".amr")


class MediaError(ValueError):
    """A media file cannot be used. The message names the file, what is wrong with it, and what to do."""


_time_limit: ContextVar[tuple[float, float] | None] = ContextVar("time_limit", default=None)  # when it ends; seconds


@contextlib.contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """
    Limits the time that the thread decodes in a `with` block: then the functions below raise a `MediaError`. They ask
    the clock between packets, so that one that is being decoded is finished.
    """
    token = _time_limit.set((time.monotonic() + seconds, seconds))
    try:
        yield
    finally:
        _time_limit.reset(token)


def check_time(container: InputContainer) -> None:
    """Raises a `MediaError` after the end of the [`time_limit`], if there is one."""
    limit = _time_limit.get()
    if limit is not None and time.monotonic() > limit[0]:
        raise MediaError(
            f"{container.name} takes longer to be decoded than the {limit[1]:g} seconds that there are. Cut it, or "
            "make its frames smaller."
        )


class _IndexMismatch(Exception):
    """The decoder gives other frames than the packets promise; the frames have to be counted by decoding them."""


@dataclass
class OpenedMedia:
    """A source as something that decoders open: a local file, or bytes in memory. `name` is for error messages.

    It takes the place of the source wherever one is asked for, so that what is read twice is fetched once.
    """

    name: str
    path: str | None = None
    data: bytes | None = None
    is_opened_media = True

    @contextlib.contextmanager
    def container(self) -> Generator[InputContainer]:
        """Open with PyAV; every error of FFmpeg inside the block becomes a `MediaError`."""
        import av

        # Titles in unknown encodings are no reason not to read a file; PyAV 19 takes them without being told
        tolerant = {"metadata_errors": "replace"} if _pyav_version() < 19 else {}
        try:
            with av.open(
                self.path if self.path is not None else io.BytesIO(self.data or b""),
                container_options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"},
                **tolerant,
            ) as container:
                yield container
        except (av.error.FFmpegError, OSError) as error:
            reason = f"{error.strerror or error}"
            if isinstance(error, av.error.InvalidDataError) or error.errno == errno.EINVAL:
                reason = (
                    "it is no media file of a known kind, or its header is missing or damaged (cut in a download?)"
                )
            raise MediaError(f"{self.name} cannot be read: {reason}.") from error


MediaSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | OpenedMedia


def is_opened(source: Any) -> TypeGuard[OpenedMedia]:
    """
    Whether a source is an [`OpenedMedia`]. Asked of its attribute and not of its class, of which there are several
    where classes come from a folder through `trust_remote_code`: each of them brings its own copy of this file.
    """
    return getattr(source, "is_opened_media", False)


@contextlib.contextmanager
def open_media(source: MediaSource) -> Generator[OpenedMedia]:
    """Make a source readable for the duration of a `with` block.

    Args:
        source: a path, an `http(s)://` address (fetched to a temporary file, which is removed at the end), a `data:`
            URI, the bytes of a file, a binary file object, or one that is open already.

    Yields:
        What the functions below take as their source, too.

    Raises:
        MediaError: no such file, an empty one, another scheme than http(s), a failed or too large download.
    """
    name = describe_source(source)
    if is_opened(source):
        yield source
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield _from_bytes(bytes(source), name)
    elif isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        scheme = text.partition("://")[0].lower() if "://" in text else ""
        if text.startswith("data:"):
            yield _from_bytes(decode_data_uri(text), name)
        elif scheme in ("http", "https"):
            with tempfile.TemporaryDirectory(prefix="videollama-") as folder:
                suffix = os.path.splitext(text.split("?")[0])[1]  # tells the kind of some files without a header
                path = os.path.join(folder, "download" + (suffix if suffix[1:].isalnum() else ""))
                _download(text, path)
                yield _from_path(path, text)
        elif scheme:
            raise MediaError(
                f"{text} cannot be opened: only http:// and https:// addresses are, not {scheme}://. Give local files"
                " by their path."
            )
        else:
            yield _from_path(text, text)
    elif callable(read := getattr(source, "read", None)):
        yield _from_bytes(read(), name)
    else:
        raise TypeError(
            "A media source is a path, an http(s) address, a data: URI, bytes or a binary file object, not"
            f" {type(source).__name__}."
        )


def describe_source(source: MediaSource) -> str:
    """What error messages call a source: its path or address, or the beginning of its data: URI."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        return f"{text[:40]}…" if text.startswith("data:") else text
    return str(getattr(source, "name", source))


def _from_bytes(data: bytes, name: str) -> OpenedMedia:
    if not data:
        raise MediaError(f"{name} cannot be read: there are no bytes in it.")
    return OpenedMedia(name, data=data)


def _from_path(path: str, name: str) -> OpenedMedia:
    if not os.path.exists(path):
        raise MediaError(f"{name} does not exist (looked for it from {os.getcwd()}).")
    if os.path.isdir(path):
        raise MediaError(f"{name} is a folder, a media file is needed.")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise MediaError(f"{name} is empty (0 bytes); was it downloaded completely?")
    # An absolute path: FFmpeg takes what stands before a colon in a relative one for a protocol
    return OpenedMedia(name, path=os.path.abspath(path))


def is_address(name: str) -> bool:
    """Whether a medium is named by an address, of whatever scheme, and not by a path."""
    return "://" in name or name.startswith("data:")


def decode_data_uri(uri: str) -> bytes:
    """The bytes that a `data:` URI holds. Raises `MediaError` where it holds none."""
    header, comma, body = uri.partition(",")
    if not comma:
        raise MediaError(f"{describe_source(uri)} is no data: URI: no comma stands between its header and its data.")
    if not header.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{describe_source(uri)} does not hold valid base64: {error}.") from error


def _download(url: str, path: str) -> None:
    # Unlike the default opener's, without files and FTP, to which an address might redirect
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPRedirectHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    received = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "transformers_videollama"})
        with opener.open(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response, open(path, "wb") as file:
            expected = int(response.headers.get("Content-Length") or 0)
            while chunk := response.read(_CHUNK_BYTES):
                received += len(chunk)
                if received > MAX_DOWNLOAD_BYTES:
                    raise MediaError(
                        f"{url} is larger than the {MAX_DOWNLOAD_BYTES / 2**30:g} GiB that are fetched at most;"
                        " download it yourself and give its path."
                    )
                file.write(chunk)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{url} cannot be fetched: {getattr(error, 'reason', None) or error}.") from error
    if received < expected:
        raise MediaError(f"{url} cannot be fetched: the connection ended after {received} of {expected} bytes.")


# ---------------------------------------------------------------------------------------------------------------------
# Which frames


def medium_kind(name: str | os.PathLike) -> str | None:
    """
    `"image"`, `"video"` (a GIF is one, too) or `"audio"`, by the ending of a file's name or address, or by the type
    that a `data:` address gives; None where they do not tell.
    """
    text = os.fsdecode(name)
    if text.lower().startswith("data:"):
        kind, _, ending = text[5:].partition(";")[0].lower().partition("/")
        return "video" if ending == "gif" else kind if kind in ("image", "video", "audio") else None
    # An address may go on after the name, as one that is signed does
    ending = os.path.splitext(urllib.parse.urlsplit(text).path if "://" in text else text)[1].lower()
    endings = {"image": IMAGE_ENDINGS, "video": VIDEO_ENDINGS, "audio": AUDIO_ENDINGS}
    return next((kind for kind, known in endings.items() if ending in known), None)


def uniform_frame_indices(total_num_frames: int, num_frames: int) -> list[int]:
    """The published system's frames for inference and instruction tuning: `arange(0, len, len / n)` truncated.

    Args:
        total_num_frames: length of the video in frames.
        num_frames: how many are wanted; a shorter video gives all of its frames.

    Returns:
        At most `num_frames` increasing indices.
    """
    count = _frame_count(total_num_frames, num_frames)
    return np.arange(0, total_num_frames, total_num_frames / count).astype(int)[:count].tolist()


def _frame_count(total_num_frames: int, num_frames: int) -> int:
    if num_frames < 1 or total_num_frames < 1:
        raise ValueError(f"Cannot choose {num_frames} of {total_num_frames} frames; both have to be positive.")
    return min(num_frames, total_num_frames)


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
    count = _frame_count(total_num_frames, num_frames)
    middle, head = total_num_frames // 2, count // 2
    first = torch.randperm(middle, generator=generator)[:head]
    second = middle + torch.randperm(total_num_frames - middle, generator=generator)[: count - head]
    return torch.cat([first, second]).sort().values.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Video


@dataclass
class _VideoIndex:
    """What the packets of the video track tell before any of them is decoded.

    `times` are the presentation times of the frames in units of the track's time base, increasing: frame `i` is the
    one shown at `times[i]`. None where the file does not give every frame a time of its own; frames are then numbered
    as the decoder gives them. `key_times` are those at which decoding can start. The first `num_certain` frames are
    not affected by data that is missing at the end of the file.
    """

    num_frames: int
    num_certain: int
    times: np.ndarray | None
    key_times: np.ndarray
    fps: float
    width: int
    height: int
    decord_is_right: bool

    def key_time_worth_seeking(self, frame: int, reached: int) -> int | None:
        """Where to seek to decode `frame` next, or None if decoding on from frame `reached` is as good."""
        if self.times is None:
            return None
        before = np.searchsorted(self.key_times, self.times[frame], side="right") - 1
        if before < 0:
            return None
        skipped = np.searchsorted(self.times, self.key_times[before]) - reached
        return int(self.key_times[before]) if skipped > _MIN_SKIPPED_FRAMES else None


def _video_stream(container: InputContainer, media: OpenedMedia) -> VideoStream:
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        if container.streams.audio:
            raise MediaError(f"{media.name} has sound but no video. Give it as audio instead.")
        raise MediaError(f"{media.name} has no video track.")
    best = container.streams.best("video")
    stream = next((stream for stream in streams if stream is best), streams[0])
    if stream.codec_context is None:
        raise MediaError(f"{media.name} holds video in a format that the installed FFmpeg cannot decode.")
    return stream


@dataclass
class _PacketList:
    """What the packets of a file say about its video. Times are in units of the track's time base."""

    times: array  # of presentation, of every frame that has one
    key_times: array
    num_frames: int = 0
    num_trimmed: int = 0  # before the start that the file's edit list sets
    last_decode_time: int | None = None
    is_intact: bool = True
    ends_in_pieces: bool = False  # only a part of the last frame is there
    end_seconds: float = 0.0  # of everything in the file


def _list_packets(packets: Iterator[Packet], stream: VideoStream) -> _PacketList:
    import av

    listed = _PacketList(times=array("q"), key_times=array("q"))
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.EOFError):
            return listed
        except av.error.FFmpegError:  # the rest of the file cannot be parsed
            listed.is_intact = False
            return listed
        if packet.size == 0:
            continue
        if packet.pts is not None and packet.time_base is not None:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            listed.end_seconds = max(listed.end_seconds, float(end))
        if packet.stream.index != stream.index:
            continue
        if packet.is_discard:
            listed.num_trimmed += 1
            continue
        listed.num_frames += 1
        listed.ends_in_pieces = packet.is_corrupt
        listed.is_intact = listed.is_intact and not packet.is_corrupt
        if packet.pts is not None:
            listed.times.append(packet.pts)
            if packet.is_keyframe:
                listed.key_times.append(packet.pts)
        if packet.dts is not None and not packet.is_corrupt:
            listed.last_decode_time = packet.dts


def _index_video(media: OpenedMedia) -> _VideoIndex:
    with media.container() as container:
        stream = _video_stream(container, media)
        container_name = container.format.name.split(",")[0]
        # MP4 lists all frames apart from their data, so that the video alone tells whether the file is complete
        frames_are_listed = container_name == "mov" and stream.frames > 0
        packets = _list_packets(container.demux(stream) if frames_are_listed else container.demux(), stream)
        if packets.num_frames == 0:
            raise MediaError(f"{media.name} has a video track without a frame in it.")

        time_base = stream.time_base or Fraction(1)
        times = np.sort(np.frombuffer(packets.times, dtype=np.int64))
        steps = np.diff(times)
        timed = len(times) == packets.num_frames
        rate = stream.average_rate if timed else stream.guessed_rate or stream.average_rate
        fps = float(rate) if rate else 0.0
        if not fps and len(steps):
            fps = float(len(steps) / ((times[-1] - times[0]) * time_base))

        num_missing, num_certain = 0, packets.num_frames
        if frames_are_listed:
            # An edit list leaves frames out, too, but shortens the stated duration with them
            frame_duration = (stream.duration or 0) / stream.frames
            stated_end = (stream.start_time or 0) + (stream.duration or 0)
            if packets.ends_in_pieces or packets.end_seconds < (stated_end - frame_duration / 2) * time_base:
                num_missing = max(stream.frames - packets.num_frames - packets.num_trimmed, 0)
                if packets.last_decode_time is not None:
                    # No missing frame is shown before it could have been decoded
                    num_certain = int(np.searchsorted(times, packets.last_decode_time, side="right"))
        else:
            longest_frame = float(steps.max() * time_base) if len(steps) else math.inf
            _check_duration(container, media, packets, tolerance=_MAX_MISSING_SECONDS + 1.5 * longest_frame)
        is_complete = num_certain == packets.num_frames + num_missing
        timed = timed and bool((steps > 0).all())
        return _VideoIndex(
            num_frames=packets.num_frames + num_missing,
            num_certain=num_certain,
            times=times if timed else None,
            key_times=np.sort(np.frombuffer(packets.key_times, dtype=np.int64)),
            fps=fps or 25.0,  # what FFmpeg, too, assumes where nothing in the file tells
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            decord_is_right=container_name in _DECORD_CONTAINERS
            and (timed and is_complete and packets.is_intact and packets.num_trimmed == 0),
        )


def _check_duration(container: InputContainer, media: OpenedMedia, packets: _PacketList, tolerance: float) -> None:
    """Compare where the packets end (the last may come without its duration) with what the header of the file says."""
    import av

    found = packets.end_seconds - (container.start_time or 0) / av.time_base
    stated = (container.duration or 0) / av.time_base
    if packets.ends_in_pieces or found < stated - tolerance:
        message = f"{media.name} is cut off: it ends after {found:.1f} s, but says that it lasts {stated:.1f} s."
        if container.format.name.split(",")[0] in ("mov", "matroska"):
            raise MediaError(f"{message} Repair the file or leave it out.")
        logger.warning(f"{message} What is there is used.")  # others only estimate how long they last


@dataclass
class _Damage:
    """What a decoder met: `events` in total, and whether it may still show in the frame that came out last."""

    events: int = 0
    shows: bool = False


def _strict_decoder(container: InputContainer, media: OpenedMedia, thread_type: str) -> VideoStream:
    """The video track, set to report what it would otherwise conceal.

    With `thread_type` "AUTO", that is several frames at a time, FFmpeg also marks frames that it could only decode in
    part, but may lose an error in the last ones. With "SLICE" it does neither.
    """
    stream = _video_stream(container, media)
    stream.codec_context.options = {"err_detect": "explode"}
    stream.thread_type = thread_type
    return stream


def _decoded_frames(
    container: InputContainer, stream: VideoStream, damage: _Damage, start: int | None, only: set[int] | None
) -> Iterator[VideoFrame]:
    """The frames from the key frame at `start` (None: from the beginning) on; `damage` is kept up to date.

    Of those that no other frame builds on, most of a usual video, but the ones at the times `only` may be left out.
    """
    import av

    packets = container.demux(stream)
    feeding, is_end = start is None, False
    while not is_end:
        check_time(container)
        try:
            packet = next(packets)
            # Seeking may land earlier than asked for; what comes before the key frame is not needed
            feeding = feeding or packet.pts == start
            if not feeding:
                continue
            if only is not None:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in only else "NONREF"
            # A part of a frame is the last that an MP4 file cut off there holds
            is_end = packet.is_corrupt and container.format.name.startswith("mov")
            frames = stream.decode(None if is_end else packet)
        except (StopIteration, av.error.EOFError):
            return
        except av.error.InvalidDataError:
            damage.events, damage.shows = damage.events + 1, True
            continue
        for frame in frames:
            damage.events += frame.is_corrupt
            damage.shows = frame.is_corrupt or (damage.shows and not frame.key_frame)
            yield frame


def _decode(
    media: OpenedMedia, index: _VideoIndex, wanted: Sequence[int], carefully: bool = False
) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames (increasing indices without repetition), decoded by PyAV one after the other.

    Everything before them is decoded too if `carefully`.

    Raises:
        MediaError: a wanted frame, or one that it may build on, is damaged or not in the file.
        _IndexMismatch: the decoder does not give the frames that the packets promise.
    """
    queue, times = deque(wanted), index.times

    def unusable(reason: str) -> MediaError:
        return MediaError(
            f"{media.name} is {reason}: frame {queue[0]} of {index.num_frames} (at {queue[0] / index.fps:.1f} s) "
            "cannot be decoded. Repair the file or leave it out."
        )

    def lost(damage: _Damage) -> Exception:
        is_damaged = damage.events > 0 or index.num_certain < index.num_frames
        return unusable("damaged") if is_damaged else _IndexMismatch()

    def seek_time() -> int | None:
        return None if carefully else index.key_time_worth_seeking(queue[0], reached)

    wanted_times = set() if times is None else {int(times[i]) for i in wanted if i < len(times)}
    only = None if carefully or times is None else wanted_times
    reached = -1
    with media.container() as container:
        stream = _strict_decoder(container, media, "AUTO")
        while queue:
            if queue[0] >= index.num_certain:
                raise unusable("cut off")
            damage, start = _Damage(), seek_time()
            if start is not None:
                container.seek(start, stream=stream)
            for frame in _decoded_frames(container, stream, damage, start, only):
                if times is None:
                    reached += 1
                elif frame.pts is not None and (frame.pts in wanted_times or frame.pts > times[queue[0]]):
                    reached = int(np.searchsorted(times, frame.pts))
                if reached < queue[0]:
                    continue
                # Without times, a lost frame shifts the number of all that follow
                if reached > queue[0] or damage.shows or (times is None and damage.events):
                    raise lost(damage)
                yield queue.popleft(), frame
                if not queue:
                    return
                if queue[0] >= index.num_certain or seek_time() is not None:
                    break
            else:
                raise lost(damage)


def _decode_safely(
    media: OpenedMedia, index: _VideoIndex, wanted: Sequence[int], use: Callable[[int, Any], None]
) -> None:
    """Call `use(index, frame)` for every wanted frame; where the fast way goes wrong, again from the start, carefully.

    Some streams cannot be decoded cleanly from what they mark as a key frame (open or gradually refreshed pictures).
    """
    try:
        for i, frame in _decode(media, index, wanted):
            use(i, frame)
    except (MediaError, _IndexMismatch):
        for i, frame in _decode(media, index, wanted, carefully=True):
            use(i, frame)


class _Scaler:
    """Scales decoded frames as decord does: turned upright, then libswscale's bilinear scaling to RGB."""

    def __init__(self, size: tuple[int, int] | None):
        self.size = size
        self.graphs: dict[tuple, Any] = {}

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (height, width, 3)"""
        turns = round(frame.rotation / 90) % 4 if frame.rotation % 90 == 0 else 0
        # A stream may change its size or its colours on the way
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, turns)
        if key not in self.graphs:
            self.graphs[key] = self._build(frame, turns)
        graph = self.graphs[key]
        graph.push(frame)
        return graph.pull().to_ndarray()

    def _build(self, frame: VideoFrame, turns: int) -> Any:
        from av.filter import Graph

        height, width = self.size or ((frame.width, frame.height) if turns % 2 else (frame.height, frame.width))
        turning = ([], ["cclock"], ["clock", "clock"], ["clock"])[turns]  # a frame's `rotation` is counter-clockwise
        graph = Graph()
        graph.link_nodes(
            graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 90000),
            ),
            *[graph.add("transpose", direction) for direction in turning],
            graph.add("scale", f"{width}:{height}:flags=bilinear"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        )
        graph.configure()
        return graph


def _read_with_pyav(
    media: OpenedMedia, index: _VideoIndex, wanted: Sequence[int], size: tuple[int, int] | None
) -> dict[int, np.ndarray]:
    scale, pictures = _Scaler(size), {}

    def keep(i: int, frame: VideoFrame) -> None:
        pictures[i] = scale(frame)

    _decode_safely(media, index, wanted, keep)
    return pictures


def _read_with_decord(
    media: OpenedMedia, index: _VideoIndex, wanted: Sequence[int], size: tuple[int, int] | None
) -> dict[int, np.ndarray] | None:
    """None if decord cannot read this file, or counts its frames differently."""
    # Not an import statement: those of a file that travels with a checkpoint must all be installed wherever it is
    # loaded
    decord = importlib.import_module("decord")

    height, width = size or (-1, -1)
    try:
        reader = decord.VideoReader(
            media.path if media.path is not None else io.BytesIO(media.data or b""), width=width, height=height
        )
        if len(reader) != index.num_frames:
            return None
        batch = reader.get_batch(list(wanted))
    except (decord.DECORDError, RuntimeError) as error:
        logger.info(f"decord cannot read {media.name}, PyAV is used: {error}")
        return None
    index.fps = reader.get_avg_fps() or index.fps
    # `decord.bridge` may have been set to torch by the user
    pictures = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
    return dict(zip(wanted, pictures, strict=True))


def _is_decord_available() -> bool:
    return importlib.util.find_spec("decord") is not None


def read_video(
    source: MediaSource,
    num_frames: int | None = None,
    size: tuple[int, int] | None = (224, 224),
    sample_indices_fn: Callable[..., Iterable[int]] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, VideoMetadata]:
    """Read some frames of a video, turned upright and scaled by the decoder itself.

    Args:
        source: see `open_media`.
        num_frames: how many frames, spread evenly over the video (`uniform_frame_indices`); None for all.
        size: (height, width) in pixels to scale to, ignoring the aspect ratio, with libswscale's bilinear scaling;
            None keeps the video's own size.
        sample_indices_fn: chooses the frames instead of `num_frames`. Called with `metadata=` a `VideoMetadata`,
            returns their indices.
        backend: "decord" or "pyav"; None takes decord where it is installed and right for the file, else PyAV.

    Returns:
        The frames, uint8 (T, 3, height, width), and their metadata; `fps` is the average frame rate, `frames_indices`
        says which frames these are.

    Raises:
        MediaError: the file cannot be opened, has no video, or a frame that is wanted cannot be decoded.
    """
    if backend not in (None, "decord", "pyav"):
        raise ValueError(f'`backend` is "decord", "pyav" or None (whichever fits the file), not {backend!r}.')
    if backend == "decord" and not _is_decord_available():
        raise ImportError('backend="decord" needs the package decord: `pip install decord`.')
    with open_media(source) as media:
        index = _index_video(media)
        try:
            return _read_video(media, index, num_frames, size, sample_indices_fn, backend)
        except _IndexMismatch:
            index.times, index.decord_is_right = None, False
            index.num_frames = index.num_certain = _count_frames(media)
            if index.num_frames == 0:
                raise MediaError(f"{media.name} has a video track, but no frame of it can be decoded.") from None
            return _read_video(media, index, num_frames, size, sample_indices_fn, backend)


def read_video_metadata(source: MediaSource) -> VideoMetadata:
    """Length, frame rate and size of a video, without decoding it. Raises `MediaError` as `read_video` does."""
    with open_media(source) as media:
        return _metadata(_index_video(media))


def _metadata(index: _VideoIndex) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=index.num_frames,
        fps=index.fps,
        width=index.width,
        height=index.height,
        duration=index.num_frames / index.fps,
    )


def _count_frames(media: OpenedMedia) -> int:
    damage = _Damage()
    with media.container() as container:
        stream = _strict_decoder(container, media, "SLICE")
        num_frames = sum(1 for _ in _decoded_frames(container, stream, damage, None, None))
    if damage.events:
        raise MediaError(f"{media.name} is damaged: some of its frames cannot be decoded. Repair it or leave it out.")
    return num_frames


def _read_video(
    media: OpenedMedia,
    index: _VideoIndex,
    num_frames: int | None,
    size: tuple[int, int] | None,
    sample_indices_fn: Callable[..., Iterable[int]] | None,
    backend: str | None,
) -> tuple[torch.Tensor, VideoMetadata]:
    metadata = _metadata(index)
    if sample_indices_fn is not None:
        indices = [int(i) for i in sample_indices_fn(metadata=metadata)]
    else:
        indices = uniform_frame_indices(index.num_frames, index.num_frames if num_frames is None else num_frames)
    if not indices or min(indices) < 0 or max(indices) >= index.num_frames:
        raise ValueError(f"{media.name} has the frames 0 to {index.num_frames - 1}, but {indices} were asked for.")
    wanted = sorted(set(indices))

    pictures = None
    if backend == "decord" or (backend is None and index.decord_is_right and _is_decord_available()):
        if index.decord_is_right:
            # decord conceals damage, so the frames are decoded by PyAV too
            _decode_safely(media, index, wanted, use=lambda i, frame: None)
            pictures = _read_with_decord(media, index, wanted, size)
        if pictures is None and backend == "decord":
            raise MediaError(f'decord cannot read {media.name} correctly; use backend="pyav".')
        metadata.video_backend = "decord"
    if pictures is None:
        pictures = _read_with_pyav(media, index, wanted, size)
        metadata.video_backend = "pyav"
    metadata.fps, metadata.duration = index.fps, index.num_frames / index.fps
    metadata.frames_indices = indices
    frames = torch.from_numpy(np.stack([pictures[i] for i in indices]))
    return frames.permute(0, 3, 1, 2), metadata


# ---------------------------------------------------------------------------------------------------------------------
# Sound


def has_audio(source: MediaSource) -> bool:
    """Whether a file has an audio track, without decoding it. Raises `MediaError` as `read_audio` does."""
    with open_media(source) as media, media.container() as container:
        if container.streams.audio:
            return True
        _video_stream(container, media)
        return False


def open_picture(source: MediaSource) -> PIL.Image.Image:
    """
    A picture, upright, in its own mode.

    Raises:
        MediaError: the file is not there, or cannot be read; the message names it.
    """
    with open_media(source) as media:
        try:
            with PIL.Image.open(media.path or io.BytesIO(media.data or b"")) as image:
                return PIL.ImageOps.exif_transpose(image)
        except Exception as error:  # damage makes Pillow raise a SyntaxError, a struct.error, an EOFError and others
            raise MediaError(f"{media.name} cannot be read as an image: {error}") from error


def _pyav_version() -> int:
    import av

    return int(av.__version__.partition(".")[0])


def _keep_last_samples(packet: Packet) -> None:
    """
    FFmpeg 9, which PyAV has since 19, cuts the last block of an MP4 file's sound where the file says that it ends. All
    before it give the block whole, and so did the published system, whose clips of sound follow from the length.
    """
    skipped = packet.get_sidedata("skip_samples")
    if skipped:
        at_start, _, *reasons = struct.unpack(_SKIP_SAMPLES, bytes(skipped))
        skipped.update(struct.pack(_SKIP_SAMPLES, at_start, 0, *reasons))
        packet.set_sidedata(skipped)


def read_audio(source: MediaSource) -> tuple[np.ndarray, int] | None:
    """Read the sound of an audio file, or a video's own audio track, with PyAV.

    Args:
        source: see `open_media`.

    Returns:
        The samples, float32 (channels, samples) in [-1, 1] at the file's own rate, and that rate in Hz; None for a
        silent video, that is one without an audio track or with an empty one.

    Raises:
        MediaError: the file cannot be opened, has neither sound nor video, or its sound cannot be decoded.
    """
    import av

    with open_media(source) as media, media.container() as container:
        if not container.streams.audio:
            _video_stream(container, media)
            return None
        best = container.streams.best("audio")
        stream = next((stream for stream in container.streams.audio if stream is best), container.streams.audio[0])
        if stream.codec_context is None:
            raise MediaError(f"{media.name} holds sound in a format that the installed FFmpeg cannot decode.")
        blocks: list[np.ndarray] = []
        num_errors, resampler = 0, None
        is_mov = container.format.name.startswith("mov")
        cuts_the_end = is_mov and _pyav_version() >= 19
        packets = container.demux(stream)
        while True:
            check_time(container)
            try:
                packet = next(packets)
                if cuts_the_end:
                    _keep_last_samples(packet)
                frames = stream.decode(packet)
            except (StopIteration, av.error.EOFError):
                break
            except av.error.InvalidDataError:
                num_errors += 1
                continue
            for frame in frames:
                if resampler is None:
                    rate = frame.sample_rate
                    resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=rate)
                blocks.extend(block.to_ndarray() for block in resampler.resample(frame))
        if resampler is None:
            if num_errors:
                raise MediaError(f"{media.name} has an audio track that cannot be decoded; it is damaged.")
            return None
        samples = np.concatenate(blocks, axis=1)
        found = samples.shape[1] / rate
        stated = 0.0
        if stream.duration and stream.time_base and is_mov:
            stated = float(stream.duration * stream.time_base)
        if num_errors or found < stated - _MAX_MISSING_SOUND_SECONDS:
            raise MediaError(
                f"{media.name} has a damaged audio track: {found:.1f} s of {max(stated, found):.1f} s can be decoded,"
                f" and {num_errors} packets cannot. Repair the file or leave its sound out."
            )
        return samples, rate
