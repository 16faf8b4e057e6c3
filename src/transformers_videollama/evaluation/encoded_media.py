"""Media as the model takes them, encoded once for all questions about them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from ..media import IMAGE_ENDINGS, has_audio, open_media, read_audio, read_video
from ..modeling_video_llama import VideoLlamaForConditionalGeneration
from ..processing_video_llama import VideoLlamaProcessor, frame_timestamps, read_image
from .items import Medium
from .mvbench import FRAMES_PER_SECOND


@dataclass(frozen=True)
class EncodedMedium:
    """
    A medium that has been encoded.

    Args:
        entries (`list[dict]`): Entries of a message, which mark its place in a prompt.
        features (`dict[str, torch.Tensor]`): Inputs of the model, of a batch of one.
    """

    entries: list[dict[str, Any]]
    features: dict[str, torch.Tensor]


class MediumEncoder:
    """
    Encodes media, and keeps the last one: questions come sorted by their media.

    Args:
        model ([`VideoLlamaForConditionalGeneration`]): The model.
        processor ([`VideoLlamaProcessor`]): Its processor.
        num_frames (`int`, *optional*): Frames of a video; by default the processor's.
        hears (`bool`, *optional*): Whether videos' own sound is heard; by default as the processor does.
    """

    def __init__(
        self,
        model: VideoLlamaForConditionalGeneration,
        processor: VideoLlamaProcessor,
        num_frames: int | None = None,
        hears: bool | None = None,
    ):
        self.model = model
        self.processor = processor
        self.num_frames = num_frames
        self.hears = processor.load_audio_from_video if hears is None else hears
        self._last: tuple[tuple[Path, Medium], EncodedMedium] | None = None

    @torch.inference_mode()
    def encode(self, path: Path, medium: Medium) -> EncodedMedium:
        """
        A medium's features, from its file or, for a video, from a folder of frames.

        Raises:
            MediaError: the file cannot be used; the message names it.
        """
        if self._last is None or self._last[0] != (path, medium):
            if medium.kind == "image":
                encoded = self._encode_image(path)
            elif path.is_dir():
                frames, metadata = self._read_folder(path, medium)
                encoded = self._encode_frames(frames, metadata, None)
            else:
                encoded = self._encode_video(path, medium)
            self._last = (path, medium), encoded
        return self._last[1]

    def _encode_image(self, path: Path) -> EncodedMedium:
        pixels = self.processor.image_processor(read_image(path), return_tensors="pt")["pixel_values"]
        features = self.model.model.get_frame_features(self._moved(pixels)).last_hidden_state
        return EncodedMedium([{"type": "image"}], {"image_frame_features": features})

    def _encode_video(self, path: Path, medium: Medium) -> EncodedMedium:
        size = self.processor.video_processor.size
        with open_media(path) as opened:
            frames, metadata = read_video(
                opened,
                size=(size["height"], size["width"]),
                sample_indices_fn=lambda metadata: self._indices(metadata.total_num_frames, metadata.fps, medium),
            )
            sound: Any = None
            if self.hears and has_audio(opened):
                sound = opened
                if medium.start is not None or medium.end is not None:
                    sound = _cut(read_audio(opened), medium)
            clips = None if sound is None else self.processor.feature_extractor(sound)["input_features"]
        return self._encode_frames(frames, metadata, clips)

    def _encode_frames(self, frames: Any, metadata: VideoMetadata, clips: torch.Tensor | None) -> EncodedMedium:
        entry: dict[str, Any] = {"type": "video"}
        timestamps = frame_timestamps(metadata)
        if timestamps is not None:
            entry["timestamps"] = timestamps
        processed = self.processor.video_processor(
            frames, do_sample_frames=False, num_frames=len(frames), return_tensors="pt"
        )
        pixels = self._moved(processed["pixel_values_videos"][0])
        features = {"video_frame_features": self.model.model.get_frame_features(pixels).last_hidden_state[None]}
        if clips is None:
            return EncodedMedium([entry], features)
        features["audio_clip_features"] = self.model.model.get_clip_features(self._moved(clips)).last_hidden_state
        return EncodedMedium([{"type": "audio"}, entry], features)

    def _read_folder(self, folder: Path, medium: Medium) -> tuple[list[str], VideoMetadata]:
        """The pictures of a video that was published as its frames, in the order of their names."""
        names = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS)
        indices = self._indices(len(names), FRAMES_PER_SECOND, medium)
        metadata = VideoMetadata(total_num_frames=len(names), fps=FRAMES_PER_SECOND, frames_indices=indices)
        return [str(folder / names[index]) for index in indices], metadata

    def _indices(self, total_num_frames: int, fps: float, medium: Medium) -> list[int]:
        """The frames to be shown: spread evenly, as ever, over the part that is meant."""
        last = total_num_frames - 1
        first = 0 if medium.start is None else min(max(round(medium.start * fps), 0), last)
        if medium.end is not None:
            last = max(min(round(medium.end * fps), last), first)
        part = VideoMetadata(total_num_frames=last - first + 1, fps=fps)
        chosen = self.processor.video_processor.sample_frames(part, num_frames=self.num_frames, sampling="uniform")
        return [first + int(index) for index in chosen]

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.model.device, self.model.dtype)


def _cut(audio: Any, medium: Medium) -> Any:
    """The part of a sound that is meant; None if there is none."""
    if audio is None:
        return None
    samples, rate = audio
    first = int((medium.start or 0.0) * rate)
    last = samples.shape[1] if medium.end is None else int(medium.end * rate)
    part = samples[:, first:last]
    return (part, rate) if part.shape[1] * 20 > rate else None  # less than 50 ms is no sound
