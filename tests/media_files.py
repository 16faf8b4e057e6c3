"""Makes the media files of the tests with PyAV: videos whose frames tell their own number, sounds, and broken files.

Frame `i` of a test video is flat grey of brightness `LEVEL_STEP * i` (modulo 256), except its upper left quarter,
which is red. The brightness says which frame one sees, the red quarter which way is up.
"""

from __future__ import annotations

import math
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

LEVEL_STEP = 8
NUM_LEVELS = 256 // LEVEL_STEP


def frame_picture(index: int, height: int, width: int) -> np.ndarray:
    """The picture of frame `index`: uint8 (height, width, 3)."""
    picture = np.full((height, width, 3), (LEVEL_STEP * index) % 256, dtype=np.uint8)
    picture[: height // 2, : width // 2] = (255, 0, 0)
    return picture


def frame_numbers(frames: torch.Tensor) -> list[int]:
    """Which frames decoded pictures (T, 3, height, width) show, modulo `NUM_LEVELS`; the lower right quarter tells."""
    height, width = frames.shape[-2:]
    corner = frames[..., height // 2 + height // 8 :, width // 2 + width // 8 :].float()
    return [round(level) % NUM_LEVELS for level in (corner.mean((1, 2, 3)) / LEVEL_STEP).tolist()]


def tone(seconds: float, sampling_rate: int = 44100, channels: int = 2, frequency: float = 440.0) -> np.ndarray:
    """A sine with its octave in the second channel: float32 (channels, samples)."""
    time = np.arange(int(seconds * sampling_rate)) / sampling_rate
    return np.stack(
        [0.3 * np.sin(2 * np.pi * frequency * (channel + 1) * time) for channel in range(channels)]
    ).astype(np.float32)


def moving_noise(num_frames: int, height: int, width: int) -> np.ndarray:
    """Pictures that fill every packet, and of which each builds on the one before: (num_frames, height, width, 3)."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 240, (height // 4, width // 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
    fine = generator.integers(0, 16, (num_frames, height, width, 3))
    return (np.stack([np.roll(coarse, i, axis=1) for i in range(num_frames)]) + fine).astype(np.uint8)


def write_media(
    path: str | os.PathLike,
    num_frames: int = 20,
    pictures: np.ndarray | None = None,
    height: int = 48,
    width: int = 64,
    fps: int | Fraction = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 5,
    b_frames: int = 0,
    rotation: int = 0,
    frame_times: list[int] | None = None,
    audio: np.ndarray | None = None,
    sampling_rate: int = 44100,
    audio_codec: str = "aac",
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write a file of `num_frames` frames (0: no video track) and the sound `audio` (None: no audio track).

    Args:
        pictures: uint8 (frames, height, width, 3) to show instead.
        rotation: degrees that a player has to turn the picture counter-clockwise, as phones record it.
        frame_times: start of each frame in milliseconds, for a variable frame rate.
        audio: float32 (channels, samples).
    """
    path = Path(path)
    if pictures is not None:
        num_frames, height, width = pictures.shape[:3]
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        if title is not None:
            container.metadata["title"] = title
        if num_frames:
            video_stream = container.add_stream(codec, rate=fps)
            video_stream.width, video_stream.height, video_stream.pix_fmt = width, height, pix_fmt
            video_stream.gop_size = gop
            video_stream.codec_context.max_b_frames = b_frames
            if codec == "libx264":
                video_stream.options = {"crf": "1", "bf": str(b_frames), **(codec_options or {})}
            else:
                video_stream.options = codec_options or {}
            if frame_times is not None:
                video_stream.codec_context.time_base = Fraction(1, 1000)
        if audio is not None:
            audio_stream = container.add_stream(
                audio_codec, rate=sampling_rate, layout="mono" if audio.shape[0] == 1 else "stereo"
            )
        for index in range(num_frames):
            picture = frame_picture(index, height, width) if pictures is None else pictures[index]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            if frame_times is not None:
                frame.pts, frame.time_base = frame_times[index], Fraction(1, 1000)
            container.mux(video_stream.encode(frame))
        if num_frames:
            container.mux(video_stream.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(audio), format="fltp", layout="mono" if audio.shape[0] == 1 else "stereo"
            )
            frame.sample_rate, frame.pts = sampling_rate, 0
            container.mux(audio_stream.encode(frame))
            container.mux(audio_stream.encode(None))
    if rotation:
        _set_display_rotation(path, rotation)
    return path


def _set_display_rotation(path: Path, degrees: int) -> None:
    """Write the turn into the matrix of the video track's header, as the MP4 format stores it."""
    cosine, sine = round(math.cos(math.radians(degrees))), round(math.sin(math.radians(degrees)))
    data = bytearray(path.read_bytes())
    matrix = [cosine, -sine, 0, sine, cosine, 0, 0, 0]
    struct.pack_into(">8i", data, data.find(b"tkhd") + 44, *(value << 16 for value in matrix))
    path.write_bytes(data)


def write_damaged_image(path: Path) -> Path:
    """Write a picture whose header is whole: of a PNG the name of the second block of data is none, others are cut."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    if path.suffix == ".png":
        second = data.index(b"IDAT", data.index(b"IDAT") + 4)
        path.write_bytes(data[:second] + bytes(4) + data[second + 4 :])
    else:
        path.write_bytes(data[: len(data) // 2])
    return path


def cut(path: Path, share: float) -> Path:
    """The file without its end: `share` of its bytes remain."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damage_packet(path: Path, number: int, num_bytes: int = 64) -> Path:
    """The file with bytes in the middle of its `number`-th video packet (in the order of the file) inverted."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        start = packet.pos + packet.size // 3
        end = min(start + num_bytes, packet.pos + packet.size)
    data = bytearray(path.read_bytes())
    data[start:end] = bytes(255 - byte for byte in data[start:end])
    path.write_bytes(data)
    return path


def trim_start(path: Path, seconds: float) -> Path:
    """The file with an edit list that starts `seconds` into its video, as lossless cutting programs write it."""
    trimmed = path.with_name(f"trimmed_{path.name}")
    with (
        av.open(str(path)) as source,
        av.open(str(trimmed), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts -= int(seconds / packet.time_base)
                packet.dts -= int(seconds / packet.time_base)
                target.mux(packet)
    return trimmed


def set_avi_length(path: Path, num_frames: int) -> Path:
    """The AVI file with another number of frames in its headers than it has."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.find(b"avih") + 8 + 16, num_frames)
    struct.pack_into("<I", data, data.find(b"strh") + 8 + 32, num_frames)
    path.write_bytes(data)
    return path
