"""Makes a scene's sound: each kind with its own timbre and rhythm, at a certain moment, in the noise of a room.

Called by `make_data.py` between `world.py`, which says what sounds when, and the audio encoder. Every sound is made of
repeated strokes; pitch (8% up and down), tempo, level and the time of the first stroke differ from clip to clip.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from world import SECONDS, Scene

SAMPLING_RATE = 16000
NUM_SAMPLES = int(SECONDS * SAMPLING_RATE)
_FADE_SECONDS = 0.03


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE


def _hump(count: int) -> np.ndarray:
    """Rises and falls smoothly: (count,) from 0 over 1 to 0."""
    return np.sin(np.pi * np.arange(count) / count)


def _tone(frequency: np.ndarray | float, seconds: float, harmonics: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """A tone of a (changing) frequency in hertz with its harmonics of these levels."""
    count = int(seconds * SAMPLING_RATE)
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, count)) / SAMPLING_RATE
    return sum(level * np.sin(number * phase) for number, level in enumerate(harmonics, 1))


def _smooth_noise(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Noise without what is faster than `width` samples."""
    return np.convolve(rng.normal(size=count), np.ones(width) / width**0.5, "same")


# One stroke of each kind: (pitch factor, rng) -> samples; and the seconds from one stroke to the next.


def _bell(pitch: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(1.0)
    partials = ((1.0, 1.0, 3.0), (2.76, 0.6, 5.0), (5.4, 0.4, 8.0), (8.93, 0.25, 12.0))
    return sum(a * np.sin(2 * np.pi * 620 * pitch * f * time) * np.exp(-d * time) for f, a, d in partials)


def _drum(pitch: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(0.3)
    beat = _tone(pitch * (85 + 90 * np.exp(-30 * time)), 0.3) * np.exp(-12 * time)
    return beat + 0.25 * _smooth_noise(rng, len(time), 4) * np.exp(-60 * time)


def _whistle(pitch: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(0.85)
    tone = _tone(pitch * (2100 + 80 * np.sin(2 * np.pi * 28 * time)), 0.85)
    return (tone + 0.08 * rng.normal(size=len(time))) * _hump(len(time)) ** 0.3


def _bird(pitch: float, rng: np.random.Generator) -> np.ndarray:
    chirp = _tone(pitch * np.linspace(5200, 3200, 960), 0.06) * _hump(960)
    return np.concatenate([chirp, np.zeros(480)] * 4)


def _frog(pitch: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(0.4)
    pulses = np.exp(-((time * 32) % 1) * 5)
    return _tone(pitch * 480, 0.4, (1.0, 0.2, 0.4)) * pulses * _hump(len(time))


def _bee(pitch: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(1.0)
    wobble = 190 * pitch * (1 + 0.06 * np.sin(2 * np.pi * 3 * time))
    return _tone(wobble, 1.0, tuple(1 / n for n in range(1, 16))) * (0.8 + 0.2 * np.sin(2 * np.pi * 5 * time))


def _clock(pitch: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(0.03)
    tick, tock = (_tone(pitch * f, 0.03, (1.0, 0.5, 0.6)) * np.exp(-180 * time) for f in (2400, 1700))
    rest = np.zeros(int(0.25 * SAMPLING_RATE) - len(time))
    return np.concatenate([tick, rest, tock])


def _phone(pitch: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(0.7)
    frequency = np.where((time * 14) % 1 < 0.5, 1050.0, 1400.0) * pitch
    return _tone(frequency, 0.7, (1.0, 0.0, 0.4)) * _hump(len(time)) ** 0.2


def _horn(pitch: float, rng: np.random.Generator) -> np.ndarray:
    levels = (1.0, 0.9, 0.8, 0.6, 0.5, 0.3, 0.2)
    blast = _tone(330 * pitch, 0.55, levels) + _tone(415 * pitch, 0.55, levels)
    return blast * _hump(len(blast)) ** 0.2


def _train(pitch: float, rng: np.random.Generator) -> np.ndarray:
    count = int(0.2 * SAMPLING_RATE)
    return _smooth_noise(rng, count, 10) * np.exp(-np.arange(count) / (0.06 * SAMPLING_RATE))


def _cat(pitch: float, rng: np.random.Generator) -> np.ndarray:
    share = np.linspace(0, 1, int(0.75 * SAMPLING_RATE))
    melody = pitch * (560 + 330 * np.sin(np.pi * share**0.7) - 120 * share)
    return _tone(melody, 0.75, (0.6, 1.0, 0.7, 0.3, 0.15)) * _hump(len(share)) ** 0.6


def _dog(pitch: float, rng: np.random.Generator) -> np.ndarray:
    share = np.linspace(0, 1, int(0.16 * SAMPLING_RATE))
    bark = _tone(pitch * (420 - 230 * share), 0.16, (0.7, 1.0, 0.9, 0.7, 0.5, 0.4))
    bark = (bark + 0.9 * _smooth_noise(rng, len(bark), 5)) * _hump(len(bark)) ** 0.5
    return np.concatenate([bark, np.zeros(1200), bark])


_STROKES: dict[str, tuple[Callable[[float, np.random.Generator], np.ndarray], float]] = {
    "bell": (_bell, 0.9),
    "drum": (_drum, 0.38),
    "whistle": (_whistle, 1.0),
    "bird": (_bird, 0.55),
    "frog": (_frog, 0.7),
    "bee": (_bee, 1.0),
    "clock": (_clock, 0.5),
    "phone": (_phone, 1.0),
    "horn": (_horn, 0.8),
    "train": (_train, 0.22),
    "cat": (_cat, 1.0),
    "dog": (_dog, 0.75),
}


def kind_sound(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A kind's sound over the whole clip: float64 (NUM_SAMPLES,), at most 1."""
    stroke, period = _STROKES[kind]
    samples = stroke(rng.uniform(0.92, 1.08), rng)
    step = int(period * rng.uniform(0.85, 1.15) * SAMPLING_RATE)
    wave = np.zeros(NUM_SAMPLES + len(samples))
    # As if it had started before the clip: the tail of an earlier stroke is heard as well
    for begin in range(int(rng.uniform(0, step)) - step, NUM_SAMPLES, step):
        first = max(begin, 0)
        wave[first : begin + len(samples)] += samples[first - begin :] if begin + len(samples) > 0 else 0
    wave = wave[:NUM_SAMPLES]
    return wave / np.abs(wave).max()


def room_noise(rng: np.random.Generator) -> np.ndarray:
    """White or pink noise or the hum of the mains: float64 (NUM_SAMPLES,) of root mean square 1."""
    white = rng.normal(size=NUM_SAMPLES)
    choice = rng.integers(3)
    if choice == 1:
        spectrum = np.fft.rfft(white)
        spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20))
        white = np.fft.irfft(spectrum, NUM_SAMPLES)
    elif choice == 2:
        white = 0.2 * white + _tone(rng.choice((50, 60)), SECONDS, (1.0, 0.7, 0.5, 0.4, 0.2))
    return white / np.sqrt(np.mean(white**2))


def make_sound(scene: Scene, rng: np.random.Generator) -> np.ndarray | None:
    """A scene's sound at `SAMPLING_RATE`: float32 (1, NUM_SAMPLES) between -1 and 1; None without a sound track."""
    if not scene.audio_track:
        return None
    wave = np.zeros(NUM_SAMPLES)
    if scene.sound is not None:
        wave = kind_sound(scene.sound, rng) * rng.uniform(0.3, 0.8)
        fade = np.clip((SECONDS / 2 - np.arange(NUM_SAMPLES) / SAMPLING_RATE) / _FADE_SECONDS, 0, 1)
        if scene.moment == "start":
            wave *= fade
        elif scene.moment == "end":
            wave *= fade[::-1]
    if scene.noise:
        wave += scene.noise * room_noise(rng)
    return np.clip(wave, -1, 1).astype(np.float32)[None]
