"""Refuses media that are too long or too large to be decoded, and kinds of images that are programs, before they are.

What a file's header says is asked first and is not trusted: packets are listed and sound is decoded, of which nothing
is kept, until the limit is passed.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..media import MediaError, OpenedMedia, check_time
from .errors import RequestError

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Others that Pillow knows are of no use here, and one of them, EPS, is executed to be read."""
MAX_PIXELS = 2**26
"""Of a picture, and of a frame of a video: twice the 33 million of an 8K screen."""
MAX_FRAME_RATE = 240
"""Frames a second, on the average over the longest video."""
MAX_SAMPLE_RATE = 8 * 48000
"""Samples a second in all channels of a sound together."""


def check_media(kind: str, path: Path, max_seconds: float) -> None:
    """
    Checks one file.

    Args:
        kind (`str`): `"image"`, `"video"` or `"audio"`.
        path (`Path`): The file.
        max_seconds (`float`): The longest video or sound.

    Raises:
        RequestError: 413 if it is longer, or has more pixels or samples than any real one.
        MediaError: if it cannot be opened, is an image of another kind, or takes longer than a [`time_limit`].
    """
    if kind == "image":
        _check_image(path)
    else:
        with OpenedMedia(str(path), path=str(path)).container() as container:
            _check_container(container, max_seconds)


def _check_image(path: Path) -> None:
    from PIL import Image

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise _too_large(f"an image has more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # damage makes Pillow raise a SyntaxError, a struct.error, an EOFError and others
        raise MediaError(f"{path} is no image of a known kind: {', '.join(IMAGE_FORMATS)}.") from error
    _check_pixels(width, height)


def _check_container(container: Any, max_seconds: float) -> None:
    import av

    if (container.duration or 0) / av.time_base > max_seconds:
        raise _too_long(max_seconds)
    for stream in container.streams.video:
        _check_pixels(stream.width, stream.height)
    for stream in container.streams.audio:
        context = stream.codec_context
        if context is not None and (context.sample_rate or 0) * (context.channels or 0) > MAX_SAMPLE_RATE:
            raise _too_large(f"a sound has more than {MAX_SAMPLE_RATE} samples a second")
    starts: dict[int, float] = {}
    num_frames: dict[int, int] = defaultdict(int)
    seconds_of_sound: dict[int, float] = defaultdict(float)
    packets = container.demux(*container.streams.video, *container.streams.audio)
    while True:
        check_time(container)
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):  # the rest is not read by whoever decodes it either
            return
        stream = packet.stream
        if packet.pts is not None and packet.time_base is not None:
            time = float(packet.pts * packet.time_base)
            starts[stream.index] = min(starts.get(stream.index, time), time)
            if time - starts[stream.index] > max_seconds:
                raise _too_long(max_seconds)
        if stream.type == "video":
            num_frames[stream.index] += 1
            if num_frames[stream.index] > max_seconds * MAX_FRAME_RATE + MAX_FRAME_RATE:
                raise _too_long(max_seconds)
        elif stream.codec_context is not None:
            try:
                frames = stream.decode(packet)
            except av.error.FFmpegError:  # the same
                continue
            seconds_of_sound[stream.index] += sum(frame.samples / frame.sample_rate for frame in frames)
            if seconds_of_sound[stream.index] > max_seconds + 1:  # encoders pad both ends
                raise _too_long(max_seconds)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(f"a picture of {width} x {height} has more than {MAX_PIXELS} pixels")


def _too_large(what: str) -> RequestError:
    return RequestError(413, f"A file of the request is too large: {what}.", code="media_too_large")


def _too_long(max_seconds: float) -> RequestError:
    return RequestError(
        413, f"A file of the request is longer than the {max_seconds:g} seconds of the longest.", code="media_too_long"
    )
