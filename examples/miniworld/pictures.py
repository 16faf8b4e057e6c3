"""Pictures that the frame encoder of the small model learns from, as those of the paper learnt from photographs.

Clips show at most three objects in eight colours, too little to learn shapes from in a short time. A picture shows up
to seven, of different kinds, on backgrounds as dim and noisy as a clip's: half of them in a colour of the world, half
in any other. A kind never has, nor comes near, the colour in which only the test split shows it.

Called by `encoders.py`; painted with the brushes of `drawing.py`.
"""

from __future__ import annotations

from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from drawing import RGB, VIEW, Colour, add_noise, background, paint, paste
from tqdm import tqdm
from world import COLOURS, HELD_OUT_COLOURS, KINDS

from transformers_videollama import VideoLlamaProcessor

NUMBER_SHARES = (0.05, 0.10, 0.15, 0.20, 0.20, 0.15, 0.15)  # of pictures that show 1, 2, … objects
DIAMETERS = ((0.17, 0.25), (0.17, 0.42))  # half of the objects are small
MIN_LUMINANCE = 65  # darker, an object would be lost in front of the background
MIN_DISTANCE = 75  # of a kind's colour from that of the test split, in RGB (0 to 255)
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_BATCH = 512

Targets = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a picture: shown (kinds,), rgb and places (kinds, 3)


def draw_colour(kind: str, rng: np.random.Generator) -> Colour:
    """A colour of the world or any other, but none like the one that training never shows of this kind."""
    held_out = np.array(RGB[HELD_OUT_COLOURS[kind]])
    while True:
        rgb = np.array(RGB[COLOURS[rng.integers(len(COLOURS))]]) if rng.random() < 0.5 else rng.integers(20, 256, 3)
        if rgb @ _LUMINANCE >= MIN_LUMINANCE and np.linalg.norm(rgb - held_out) >= MIN_DISTANCE:
            return int(rgb[0]), int(rgb[1]), int(rgb[2])


def draw_picture(seed: int, index: int) -> tuple[np.ndarray, Targets]:
    """
    A picture, uint8 (VIEW, VIEW, 3), and for each kind whether it is shown, its colour (0 to 1), place and diameter.
    """
    rng = np.random.default_rng([seed, index, *b"picture"])
    picture = background(rng)
    shown, rgb, places = np.zeros(len(KINDS), bool), *np.zeros((2, len(KINDS), 3), np.float32)
    taken: list[tuple[float, float, float]] = []
    number = 1 + rng.choice(len(NUMBER_SHARES), p=NUMBER_SHARES)
    for k in rng.permutation(len(KINDS))[:number]:
        diameter = rng.uniform(*DIAMETERS[rng.integers(2)])
        for _ in range(12):  # tries to find room
            x, y = rng.uniform(diameter / 2 + 0.01, 0.99 - diameter / 2, 2)
            if all(max(abs(x - a), abs(y - b)) > 0.95 * (diameter + other) / 2 for a, b, other in taken):
                colour = draw_colour(KINDS[k], rng)
                paste(picture, paint(KINDS[k], colour, round(diameter * VIEW)), x, y)
                taken.append((x, y, diameter))
                shown[k], rgb[k], places[k] = True, np.array(colour) / 255, (x, y, diameter)
                break
    return add_noise(picture, rng.uniform(1, 6), rng.integers(0, VIEW, 2)), (shown, rgb, places)


def make_pictures(
    folder: Path, number: int, processor: VideoLlamaProcessor, seed: int, processes: int
) -> dict[str, np.ndarray]:
    """
    Pictures as the processor would hand over frames, with their targets, one row each; made at the first call, read
    from the folder afterwards: frames uint8 (number, 3, height, width), shown (number, kinds), rgb, places (number,
    kinds, 3).
    """
    size = processor.video_processor.size
    columns: dict[str, tuple[tuple[int, ...], type]] = {
        "frames": ((3, size["height"], size["width"]), np.uint8),
        "shown": ((len(KINDS),), np.bool_),
        "rgb": ((len(KINDS), 3), np.float32),
        "places": ((len(KINDS), 3), np.float32),
    }
    paths = {name: folder / f"picture-{name}-{number}.npy" for name in columns}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.tmp", "w+", dtype, (number, *shape))
            for name, (shape, dtype) in columns.items()
        }
        with Pool(processes) as pool, tqdm(total=number, desc="painting pictures", unit="picture") as bar:
            for start in range(0, number, _BATCH):
                rows = range(start, min(start + _BATCH, number))
                pictures, targets = zip(*pool.map(partial(draw_picture, seed), rows, chunksize=32), strict=True)
                frames = processor.video_processor(
                    np.stack(pictures), num_frames=len(rows), do_rescale=False, do_normalize=False, return_tensors="pt"
                )
                arrays["frames"][rows.start : rows.stop] = frames["pixel_values_videos"][0].numpy()
                for name, column in zip(("shown", "rgb", "places"), zip(*targets, strict=True), strict=True):
                    arrays[name][rows.start : rows.stop] = np.stack(column)
                bar.update(len(rows))
        for name, array in arrays.items():
            array.flush()
            (folder / f"{name}.tmp").rename(paths[name])
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
