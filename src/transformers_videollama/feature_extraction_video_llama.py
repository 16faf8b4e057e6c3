"""The feature extractor: from the sound of a video to ImageBind's log-mel clips.

Second step of the flow for sound, after `media.read_audio`: resample to 16 kHz, cut clips spread over the whole track,
and compute the Kaldi filter bank of all clips at once. The result is `input_features` of the audio branch.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import TensorType

from .media import MediaError, describe_source, read_audio


class VideoLlamaFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Log-mel filter banks of clips spread evenly over a sound, as ImageBind's audio tower takes them.

    Clip `k` of `num_clips` starts at `k * max(duration - clip_duration, 0) / num_clips` seconds, as in the published
    system (which divides by the number of clips and so never quite reaches the end). Each clip goes through Kaldi's
    filter bank: windows without partial ones at the end, the mean of each removed, pre-emphasis, symmetric Hann
    window, power spectrum, triangular filters on Kaldi's mel scale, logarithm.

    Args:
        feature_size (`int`, *optional*, defaults to 128):
            Number of mel bins.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Rate in Hz to which all sound is resampled.
        padding_value (`float`, *optional*, defaults to 0.0):
            What a clip shorter than `num_mel_frames` is filled up with, after the logarithm and before normalising.
        num_clips (`int`, *optional*, defaults to 8):
            Number of clips taken from each sound.
        clip_duration (`float`, *optional*, defaults to 2.0):
            Length of a clip in seconds.
        num_mel_frames (`int`, *optional*, defaults to 204):
            Number of windows a clip is cut or padded to.
        frame_length (`float`, *optional*, defaults to 25.0):
            Length of a window in milliseconds.
        frame_shift (`float`, *optional*, defaults to 10.0):
            Distance between the starts of two windows in milliseconds.
        preemphasis (`float`, *optional*, defaults to 0.97):
            Share of the previous sample that is subtracted from each sample.
        min_frequency (`float`, *optional*, defaults to 20.0):
            Lower edge of the lowest mel bin in Hz. The highest one ends at half the sampling rate.
        mel_floor (`float`, *optional*, defaults to 1.1920929e-07):
            Smallest energy that the logarithm is taken of.
        mean (`float`, *optional*, defaults to -4.268):
            Subtracted from the log energies.
        std (`float`, *optional*, defaults to 9.138):
            What the log energies are divided by.
        padding_side (`str`, *optional*, defaults to `"left"`):
            Nothing here is padded by it; but pipelines batch only where it is the tokenizer's, and prompts are padded
            left.
    """

    _auto_class = "AutoFeatureExtractor"

    model_input_names = ["input_features"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        num_clips: int = 8,
        clip_duration: float = 2.0,
        num_mel_frames: int = 204,
        frame_length: float = 25.0,
        frame_shift: float = 10.0,
        preemphasis: float = 0.97,
        min_frequency: float = 20.0,
        mel_floor: float = 1.1920929e-07,
        mean: float = -4.268,
        std: float = 9.138,
        padding_side: str = "left",
        **kwargs: Any,
    ):
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            padding_side=padding_side,
            **kwargs,
        )
        self.num_clips = num_clips
        self.clip_duration = clip_duration
        self.num_mel_frames = num_mel_frames
        self.frame_length = frame_length
        self.frame_shift = frame_shift
        self.preemphasis = preemphasis
        self.min_frequency = min_frequency
        self.mel_floor = mel_floor
        self.mean = mean
        self.std = std

    def __call__(
        self,
        raw_audio: Any,
        sampling_rate: int | Sequence[int | None] | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            raw_audio:
                One sound or a list of sounds. A sound is an array, a tensor or a list of numbers `(samples,)` or
                `(channels, samples)`, one of these in a pair with its rate, or a file (path, http(s) address, `data:`
                URI, bytes) of any format; of a video its audio track. Arrays of integers are taken as PCM.
            sampling_rate (`int` or list of `int`, *optional*):
                Rate in Hz of the sounds given as arrays, one for all or one for each; the extractor's own by default.
                Files know their own.
            return_tensors (`str` or [`~utils.TensorType`], *optional*):
                "pt" or "np"; without it, torch tensors too.

        Returns:
            [`BatchFeature`] with `input_features`, float32 `(sounds, num_clips, feature_size, num_mel_frames)`.

        Raises:
            `MediaError`: a file cannot be read or is silent. `ValueError`: a sound shorter than a window (25 ms),
            or an array of another shape.
        """
        sounds: list[Any] = list(raw_audio) if _is_batch(raw_audio) else [raw_audio]
        if not sounds:
            raise ValueError("No sound was given: the list is empty.")
        rates: list[Any] = (
            list(sampling_rate) if isinstance(sampling_rate, (list, tuple)) else [sampling_rate] * len(sounds)
        )
        if len(rates) != len(sounds):
            raise ValueError(f"{len(sounds)} sounds were given, but {len(rates)} sampling rates.")
        clips = [self._cut_clips(*self._load(sound, rate)) for sound, rate in zip(sounds, rates, strict=True)]
        return BatchFeature({"input_features": self._log_mel(clips)}, tensor_type=return_tensors)

    def _load(self, sound: Any, rate: int | None) -> tuple[np.ndarray, int]:
        """A sound as float32 (channels, samples), and its rate in Hz."""
        if _is_pair(sound):
            sound, rate = sound
        if not isinstance(sound, (np.ndarray, torch.Tensor, list, tuple)):
            audio = read_audio(sound)
            if audio is None:
                raise MediaError(f"{describe_source(sound)} has no sound: it has no audio track, or an empty one.")
            return audio
        if isinstance(sound, torch.Tensor):
            sound = sound.detach().cpu()
            sound = (sound.float() if sound.dtype == torch.bfloat16 else sound).numpy()
        samples = np.asarray(sound)
        if np.issubdtype(samples.dtype, np.integer):  # PCM; its scale is that of the type, and zero is in its middle
            limits = np.iinfo(samples.dtype)
            zero = 0.0 if limits.min else (limits.max + 1) / 2
            samples = (samples - zero) / (limits.max + 1 - zero)
        if samples.ndim not in (1, 2) or np.iscomplexobj(samples):
            raise ValueError(
                "A sound is an array of real numbers of the shape (samples,) or (channels, samples); this one is of"
                f" the shape {tuple(samples.shape)} and the type {samples.dtype}."
            )
        samples = np.atleast_2d(samples.astype(np.float32, copy=False))
        if not np.isfinite(samples).all():
            raise ValueError(
                f"A sound is of finite numbers; this one, of the shape {tuple(samples.shape)}, has"
                f" {np.count_nonzero(~np.isfinite(samples))} values that are not."
            )
        rate = self.sampling_rate if rate is None else rate
        if not (isinstance(rate, (int, np.integer)) and rate > 0):
            raise ValueError(f"A sampling rate is a whole number of Hz above 0, not {rate!r}.")
        return samples, int(rate)

    def _cut_clips(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """
        The clips of one sound at `sampling_rate`, (num_clips, samples of a clip or of the whole sound if shorter).
        """
        length = samples.shape[1]
        if length * 1000 < self.frame_length * rate:
            raise ValueError(
                f"A sound has to last {self.frame_length:g} ms at least; one of the shape {samples.shape} (channels,"
                f" samples) at {rate} Hz does not."
            )
        # The published system also subtracts the mean over all channels, which cancels out: the filter bank removes
        # that of every window.
        track = samples[0]
        duration = length / rate
        starts = np.arange(self.num_clips) * max(duration - self.clip_duration, 0) / self.num_clips
        num_samples = min(int(self.clip_duration * self.sampling_rate), length * self.sampling_rate // rate)
        return np.stack([self._resample(track, rate, int(s * self.sampling_rate), num_samples) for s in starts])

    def _resample(self, track: np.ndarray, rate: int, start: int, num_samples: int) -> np.ndarray:
        """`num_samples` from `start` on (both counted at `sampling_rate`) of the track, without resampling the rest.

        Of librosa's methods the polyphase one comes closest to the windowed sinc of the published system.
        """
        if rate == self.sampling_rate:
            return track[start : start + num_samples]
        import librosa

        # `up` samples of the result stand for `down` samples of the track; the filter reaches 10 / min(up, down) such
        # blocks to both sides
        up, down = (value // math.gcd(rate, self.sampling_rate) for value in (self.sampling_rate, rate))
        reach = 10 // min(up, down) + 1
        first, last = max(start // up - reach, 0), (start + num_samples) // up + 1 + reach
        resampled = librosa.resample(
            track[first * down : last * down], orig_sr=rate, target_sr=self.sampling_rate, res_type="polyphase"
        )
        return resampled[start - first * up :][:num_samples]

    def _log_mel(self, sounds: list[np.ndarray]) -> torch.Tensor:
        """
        Kaldi's filter bank of all clips of all sounds at once: (sounds, num_clips, feature_size, num_mel_frames).
        """
        window_length = int(self.sampling_rate * self.frame_length / 1000)
        shift = int(self.sampling_rate * self.frame_shift / 1000)
        fft_length = 1 << (window_length - 1).bit_length()
        num_windows = torch.tensor([1 + (clips.shape[1] - window_length) // shift for clips in sounds])
        # Shorter sounds are filled up only to compute them together: their extra windows are overwritten below
        longest = max(clips.shape[1] for clips in sounds)
        waveforms = torch.from_numpy(
            np.stack([np.pad(clips, ((0, 0), (0, longest - clips.shape[1]))) for clips in sounds])
        )
        windows = waveforms.unfold(-1, window_length, shift)  # (sounds, num_clips, windows, window_length)
        windows = windows - windows.mean(-1, keepdim=True)
        previous = torch.cat([windows[..., :1], windows[..., :-1]], dim=-1)
        windows = (windows - self.preemphasis * previous) * torch.hann_window(window_length, periodic=False)
        power = torch.fft.rfft(windows, n=fft_length).abs().square()
        filters = _mel_filters(fft_length, self.feature_size, self.min_frequency, self.sampling_rate)
        log_mel = (power @ filters).clamp(min=self.mel_floor).log()
        is_extra = torch.arange(log_mel.shape[2]) >= num_windows[:, None]
        log_mel = log_mel.masked_fill(is_extra[:, None, :, None], self.padding_value)
        missing = self.num_mel_frames - log_mel.shape[2]
        log_mel = torch.nn.functional.pad(log_mel, (0, 0, 0, missing), value=self.padding_value)  # or cut
        return ((log_mel - self.mean) / self.std).transpose(-1, -2).contiguous()


@functools.lru_cache
def _mel_filters(fft_length: int, num_bins: int, min_frequency: float, sampling_rate: int) -> torch.Tensor:
    """Kaldi's triangular filters, (fft_length / 2 + 1, num_bins)."""
    with warnings.catch_warnings():
        # At the published sizes some of the lowest filters lie between two frequencies of the spectrum and are empty
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        filters = mel_filter_bank(
            num_frequency_bins=fft_length // 2 + 1,
            num_mel_filters=num_bins,
            min_frequency=min_frequency,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return torch.from_numpy(filters).float()


def _is_pair(sound: Any) -> bool:
    """(samples, rate), as `read_audio` returns it"""
    return (
        isinstance(sound, tuple)
        and len(sound) == 2
        and isinstance(sound[1], (int, np.integer))
        and np.ndim(sound[0]) > 0
    )


def _is_batch(raw_audio: Any) -> bool:
    if isinstance(raw_audio, (np.ndarray, torch.Tensor)):
        return raw_audio.ndim == 3
    if not isinstance(raw_audio, (list, tuple)) or _is_pair(raw_audio):
        return False
    return not (raw_audio and isinstance(raw_audio[0], (int, float)))


__all__ = ["VideoLlamaFeatureExtractor"]
