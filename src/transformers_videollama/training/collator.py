"""Samples to a batch: texts padded, media one after the other. The last step before the model; runs in the workers."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

_IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
# Inputs with a frame axis, and the mask that tells their frames from padding
_FRAME_MASKS = {
    "pixel_values_videos": "padding_mask_videos",
    "video_frame_features": "padding_mask_videos",
    "audio_pixel_values_videos": "audio_padding_mask_videos",
    "audio_clip_features": "audio_padding_mask_videos",
}
_IMAGES = ("pixel_values", "image_frame_features")


class VideoLlamaDataCollator:
    """
    Makes a batch of the samples of [`SampleBuilder`].

    Args:
        pad_token_id (`int`): what `input_ids` are padded with.
        padding_side (`str`, defaults to `"right"`): where texts are padded, `"right"` (as published) or `"left"`.
        pad_to_multiple_of (`int`, *optional*): pad texts to a multiple of this length.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right", pad_to_multiple_of: int | None = None):
        if padding_side not in ("right", "left"):
            raise ValueError(f'`padding_side` is "right" or "left", not {padding_side!r}.')
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples: as [`SampleBuilder`] returns them.

        Returns:
            `input_ids`, `labels` (-100 in the padding) and `attention_mask`, int64 (batch, length); the media of all
            samples in reading order, each kind only where there is one: `pixel_values` (images, 3, height, width),
            `pixel_values_videos` and `audio_pixel_values_videos` (media, frames, 3, height, width), or their features
            under the names of the samples. Where they differ in their number of frames, shorter ones end in zeros, and
            `padding_mask_videos` or `audio_padding_mask_videos` (media, frames), int64, has 1 for a frame. `position`,
            int64 (4,), is the last sample's, of a [`TrainIterableDataset`].
        """
        batch = {
            "input_ids": self._pad([sample["input_ids"] for sample in samples], self.pad_token_id),
            "labels": self._pad([sample["labels"] for sample in samples], _IGNORED),
            "attention_mask": self._pad([torch.ones_like(sample["input_ids"]) for sample in samples], 0),
        }
        for name in _IMAGES:
            if images := [image for sample in samples for image in sample.get(name, ())]:
                batch[name] = torch.stack(images)
        for name, mask_name in _FRAME_MASKS.items():
            if clips := [clip for sample in samples for clip in sample.get(name, ())]:
                batch[name] = pad_sequence(clips, batch_first=True)
                lengths = torch.tensor([len(clip) for clip in clips])
                if (lengths != lengths.max()).any():
                    batch[mask_name] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        if "position" in samples[-1]:
            batch["position"] = samples[-1]["position"]
        return batch

    def _pad(self, sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=self.padding_side)
        missing = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        sides = (0, missing) if self.padding_side == "right" else (missing, 0)
        return torch.nn.functional.pad(padded, sides, value=value)
