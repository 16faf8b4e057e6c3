"""What the model is given of a video or a picture, as pictures for people: sampled frames and a spectrogram."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps

from ..media import has_audio, read_audio
from ..processing_video_llama import read_image

if TYPE_CHECKING:
    from ..processing_video_llama import VideoLlamaProcessor


def sampled_frames(
    processor: VideoLlamaProcessor, path: str | Path, num_frames: int | None = None
) -> list[tuple[Image.Image, float]]:
    """
    The frames of a video that the model is shown, as large as it sees them, each with its time in seconds.

    Args:
        processor ([`VideoLlamaProcessor`]): The model's.
        path (`str` or `Path`): A video file.
        num_frames (`int`, *optional*): How many frames; by default what the model was made for.

    Raises:
        MediaError: if the file cannot be used.
    """
    options = {} if num_frames is None else {"num_frames": num_frames}
    videos = processor.video_processor(
        str(path), do_normalize=False, return_metadata=True, return_tensors="pt", **options
    )
    times = videos["video_metadata"][0].timestamps
    frames = videos["pixel_values_videos"][0]
    return [(_picture(frame), float(time)) for frame, time in zip(frames, times, strict=False)]  # padding has no time


def seen_image(processor: VideoLlamaProcessor, path: str | Path) -> Image.Image:
    """An image file as the model sees it. Raises `MediaError` if it cannot be decoded."""
    images = processor.image_processor(read_image(path), do_normalize=False, return_tensors="pt")
    return _picture(images["pixel_values"][0])


def spectrogram(
    processor: VideoLlamaProcessor, path: str | Path, width: int, height: int
) -> tuple[Image.Image, float] | None:
    """
    The log-mel windows of a file's sound that the model hears, at their places in time; low pitches are at the bottom,
    parts that are not heard are black.

    Args:
        processor ([`VideoLlamaProcessor`]): The model's.
        path (`str` or `Path`): A video or sound file.
        width (`int`): Of the picture, which stands for the whole sound.
        height (`int`): Of the picture.

    Returns:
        `tuple[Image.Image, float]`: the picture, and how many seconds it stands for; None if there is no sound.

    Raises:
        MediaError: if the file cannot be used.
    """
    sound = read_audio(path) if has_audio(path) else None
    if sound is None:
        return None
    extractor = processor.feature_extractor
    samples, rate = sound
    seconds = samples.shape[1] / rate
    heard = min(extractor.clip_duration, seconds)
    windows = extractor(sound, return_tensors="pt")["input_features"][0]
    num_columns = max(1 + int((heard * 1000 - extractor.frame_length) / extractor.frame_shift), 1)
    windows = windows[:, :, :num_columns].flip(1)  # the rest is padding
    low, high = windows.min(), windows.max()
    pixels = ((windows - low) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8).numpy()
    sheet = Image.new("RGB", (width, height))
    scale = width / seconds
    for number, window in enumerate(pixels):
        start = number * max(seconds - extractor.clip_duration, 0) / extractor.num_clips
        picture = ImageOps.colorize(Image.fromarray(window), "#120030", "#fff6c0", mid="#c83c50")
        size = (max(round(heard * scale), 1), height)
        sheet.paste(picture.resize(size, Image.Resampling.BILINEAR), (round(start * scale), 0))
    return sheet, seconds


def _picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of values in [0, 1] of shape `(3, height, width)`."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
