"""The feature extractor: the published system's log-mel clips from files, and the same from arrays of every kind."""

from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from media_files import tone, write_media
from safetensors.torch import load_file

from transformers_videollama.feature_extraction_video_llama import VideoLlamaFeatureExtractor
from transformers_videollama.media import MediaError, read_audio

SYNTH = Path(__file__).parent / "reference" / "synth"


@pytest.fixture(scope="module")
def extractor() -> VideoLlamaFeatureExtractor:
    return VideoLlamaFeatureExtractor()


def sound(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """Noise whose loudness changes, so that no two clips are alike: float32 (channels, samples)."""
    num_samples = int(seconds * rate)
    loudness = np.linspace(0.01, 0.5, num_samples)
    return (np.random.default_rng(0).normal(size=(channels, num_samples)) * loudness).astype(np.float32)


@pytest.mark.parametrize("name", ["clip", "clip_short"])
def test_features_are_those_of_the_published_system(name: str, extractor: VideoLlamaFeatureExtractor):
    expected = load_file(SYNTH / f"{name}.safetensors")["mel"].float()[:, 0]
    features = extractor(SYNTH / f"{name}.mp4", return_tensors="pt")["input_features"]
    assert features.shape == (1, 8, 128, 204) and features.dtype == torch.float32
    difference = (features[0] - expected).abs()
    assert difference.mean() < 0.01
    assert difference[:, :115].max() < 0.03


def kaldi_log_mel(clip: np.ndarray) -> np.ndarray:
    """The filter bank written down window by window, in float64: (windows, 128)."""
    frequencies = np.arange(257) * 16000 / 512

    def mel(frequency):
        return 1127 * np.log(1 + np.asarray(frequency) / 700)

    edges = np.linspace(mel(20), mel(8000), 130)
    rising = (mel(frequencies)[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel(frequencies)[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    rows = []
    for start in range(0, len(clip) - 399, 160):
        window = clip[start : start + 400].astype(np.float64)
        window = window - window.mean()
        window = window - 0.97 * np.concatenate([window[:1], window[:-1]])
        window = window * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399))
        rows.append(np.log(np.maximum(np.abs(np.fft.rfft(window, 512)) ** 2 @ filters, 1.1920929e-07)))
    return np.stack(rows)


@pytest.mark.parametrize("seconds", [0.025, 0.5, 1.99, 2, 2.01, 7.3])
def test_clips_are_spread_over_the_sound(seconds: float, extractor: VideoLlamaFeatureExtractor):
    samples = sound(seconds)
    features = extractor(samples)["input_features"][0].numpy()
    duration = samples.shape[1] / 16000
    for k in range(8):
        start = k * max(duration - 2, 0) / 8
        log_mel = kaldi_log_mel(samples[0, int(start * 16000) : int((start + 2) * 16000)])
        expected = np.zeros((204, 128))
        expected[: len(log_mel)] = log_mel[:204]
        np.testing.assert_allclose(features[k], ((expected + 4.268) / 9.138).T, atol=2e-3)


def test_a_short_sound_gives_equal_padded_clips(extractor: VideoLlamaFeatureExtractor):
    features = extractor(sound(1))["input_features"][0]
    assert (features == features[:1]).all()
    torch.testing.assert_close(features[:, :, 98:], torch.full((8, 128, 106), 4.268 / 9.138))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_any_rate_is_resampled(rate: int, extractor: VideoLlamaFeatureExtractor):
    # What all rates can carry: a tone below the lowest one's limit
    features = extractor(tone(5, rate, 1), sampling_rate=rate)["input_features"]
    expected = extractor(tone(5, 16000, 1), sampling_rate=16000)["input_features"]
    loud = expected > expected.max() - 0.5
    assert (features - expected)[loud].abs().max() < 0.01


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_only_the_clips_are_resampled(rate: int, extractor: VideoLlamaFeatureExtractor):
    samples = sound(20, rate)
    whole = librosa.resample(samples, orig_sr=rate, target_sr=16000, res_type="polyphase")
    features = extractor(samples, sampling_rate=rate)["input_features"]
    torch.testing.assert_close(features, extractor(whole)["input_features"], atol=1e-4, rtol=0)


def test_the_first_channel_is_heard(extractor: VideoLlamaFeatureExtractor):
    samples = sound(4, channels=2)
    features = extractor(samples)["input_features"]
    torch.testing.assert_close(features, extractor(samples[0])["input_features"])
    assert (features - extractor(samples[1])["input_features"]).abs().max() > 0.1


def test_every_form_of_sound_gives_the_same(extractor: VideoLlamaFeatureExtractor):
    path = SYNTH / "clip.mp4"
    samples, rate = read_audio(path)
    expected = extractor(samples, sampling_rate=rate)["input_features"]
    forms = {
        "path": path,
        "path string": str(path),
        "bytes": path.read_bytes(),
        "list of one": [str(path)],
        "pair": (samples, rate),
        "list of pairs": [(samples, rate)],
    }
    for name, form in forms.items():
        torch.testing.assert_close(extractor(form)["input_features"], expected, msg=name, atol=0, rtol=0)
    forms = {
        "list of arrays": [samples],
        "tensor": torch.from_numpy(samples),
        "float64": samples.astype(np.float64),
        "lists": samples.tolist(),
        "numbers": samples[0].tolist(),
        "batch of sounds": samples[None],
    }
    for name, form in forms.items():
        if name == "lists":
            form = [form]
        features = extractor(form, sampling_rate=rate)["input_features"]
        torch.testing.assert_close(features, expected, msg=name, atol=1e-6, rtol=0)
    torch.testing.assert_close(extractor((samples, np.int64(rate)))["input_features"], expected, atol=1e-6, rtol=0)
    for wrong in (0, -1, 22050.5):
        with pytest.raises(ValueError, match="whole number of Hz above 0"):
            extractor(samples, sampling_rate=wrong)
    pcm = (samples * 32768).round().clip(-32768, 32767).astype(np.int16)
    loud = expected > 0
    assert (extractor(pcm, sampling_rate=rate)["input_features"] - expected)[loud].abs().max() < 0.01
    unsigned = (pcm.astype(np.int32) + 32768).astype(np.uint16)  # as 8-bit PCM, whose zero is in the middle
    assert torch.equal(
        extractor(unsigned, sampling_rate=rate)["input_features"], extractor(pcm, sampling_rate=rate)["input_features"]
    )
    brain = torch.tensor(samples).bfloat16()
    assert torch.equal(
        extractor(brain, sampling_rate=rate)["input_features"],
        extractor(brain.float(), sampling_rate=rate)["input_features"],
    )


def test_sounds_of_one_call_do_not_affect_each_other(extractor: VideoLlamaFeatureExtractor, tmp_path: Path):
    wav = write_media(tmp_path / "sound.wav", num_frames=0, audio=tone(3), audio_codec="pcm_s16le")
    sounds = [sound(1), sound(5, 44100, 2), wav, sound(0.03)]
    rates = [16000, 44100, None, None]
    together = extractor(sounds, sampling_rate=rates)["input_features"]
    assert together.shape == (4, 8, 128, 204)
    for features, one, rate in zip(together, sounds, rates, strict=True):
        torch.testing.assert_close(features, extractor(one, sampling_rate=rate)["input_features"][0])


@pytest.mark.parametrize(
    ("raw_audio", "reason"),
    [
        (np.zeros(0), "at least"),
        (np.zeros((2, 0)), "at least"),
        (np.zeros(399), "25 ms"),
        (np.zeros((16000, 2)), "25 ms"),  # samples first
        ([], "empty"),
        (np.array([np.nan] * 1000), "finite"),
        (np.zeros((1, 1, 1, 1000)), "shape"),
        (np.zeros(1000, np.complex64), "real numbers .* type complex64"),
    ],
)
def test_what_is_no_sound_is_refused(raw_audio, reason: str, extractor: VideoLlamaFeatureExtractor):
    with pytest.raises(ValueError, match=reason):
        extractor(raw_audio)


def test_the_number_of_rates_has_to_fit(extractor: VideoLlamaFeatureExtractor):
    with pytest.raises(ValueError, match="2 sounds .* 1 sampling rates"):
        extractor([sound(1), sound(1)], sampling_rate=[16000])


def test_files_without_sound_are_named(extractor: VideoLlamaFeatureExtractor, tmp_path: Path):
    with pytest.raises(MediaError, match="clip_silent.mp4 has no sound"):
        extractor(SYNTH / "clip_silent.mp4")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(MediaError, match="text.wav"):
        extractor([SYNTH / "clip.mp4", tmp_path / "text.wav"])


def test_save_and_load(tmp_path: Path):
    extractor = VideoLlamaFeatureExtractor(num_clips=3, clip_duration=1.0, num_mel_frames=100, feature_size=64)
    samples = sound(5)
    features = extractor(samples)["input_features"]
    assert features.shape == (1, 3, 64, 100)
    extractor.save_pretrained(tmp_path)
    loaded = VideoLlamaFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert VideoLlamaFeatureExtractor.from_dict(extractor.to_dict()).to_json_string() == extractor.to_json_string()
    assert torch.equal(loaded(samples)["input_features"], features)


def test_longer_clips_are_cut_to_the_number_of_windows():
    samples = sound(5)
    longer = VideoLlamaFeatureExtractor(clip_duration=3.0, num_clips=1)(samples)["input_features"]
    assert longer.shape == (1, 1, 128, 204)
    expected = ((kaldi_log_mel(samples[0])[:204] + 4.268) / 9.138).T
    np.testing.assert_allclose(longer[0, 0].numpy(), expected, atol=2e-3)


def test_output_forms(extractor: VideoLlamaFeatureExtractor):
    as_torch = extractor(sound(3), return_tensors="pt")["input_features"]
    as_numpy = extractor(sound(3), return_tensors="np")["input_features"]
    assert isinstance(as_numpy, np.ndarray) and as_numpy.dtype == np.float32
    assert np.array_equal(as_numpy, as_torch.numpy())
