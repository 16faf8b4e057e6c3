"""Paints a scene: each kind with its own outline, in its colour, on a dim background, with the noise of a camera.

Called by `make_data.py` between `world.py`, which says what is where, and the video encoder; `pictures.py` paints with
the same brushes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw
from world import FPS, SECONDS, Scene

VIEW = 128  # pixels, the side of a clip
NUM_FRAMES = int(SECONDS * FPS)
_CANVAS = 256  # pixels, on which a kind is painted once, at least four times as large as it is shown

RGB = {
    "red": (225, 30, 35),
    "orange": (255, 135, 0),
    "yellow": (255, 232, 40),
    "green": (35, 185, 60),
    "blue": (40, 90, 255),
    "purple": (150, 45, 215),
    "pink": (255, 150, 205),
    "white": (245, 245, 245),
}
_DARK = (18, 18, 24)
_LIGHT = (255, 255, 255)
Colour = tuple[int, int, int]
Sprite = tuple[np.ndarray, np.ndarray]  # float32 (pixels, pixels, 3) and (pixels, pixels, 1)


class _Pen:
    """Draws in coordinates from 0 to 100."""

    def __init__(self) -> None:
        self.image = Image.new("RGBA", (_CANVAS, _CANVAS), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    @staticmethod
    def _scaled(points: tuple[float, ...]) -> list[float]:
        return [point * (_CANVAS - 1) / 100 for point in points]

    def ellipse(self, *box: float, fill: Colour) -> None:
        self._draw.ellipse(self._scaled(box), fill=fill)

    def box(self, *box: float, fill: Colour, round: float = 0) -> None:
        self._draw.rounded_rectangle(self._scaled(box), round * _CANVAS / 100, fill=fill)

    def polygon(self, *points: float, fill: Colour) -> None:
        self._draw.polygon(self._scaled(points), fill=fill)

    def half(self, *box: float, fill: Colour) -> None:
        self._draw.pieslice(self._scaled(box), 180, 360, fill=fill)

    def line(self, *points: float, fill: Colour, width: float = 7) -> None:
        self._draw.line(self._scaled(points), fill=fill, width=round(width * _CANVAS / 100), joint="curve")


def _bell(pen: _Pen, colour: Colour) -> None:
    pen.ellipse(38, 76, 62, 100, fill=_DARK)
    pen.ellipse(41, 0, 59, 18, fill=colour)
    pen.half(22, 8, 78, 76, fill=colour)
    pen.polygon(22, 40, 78, 40, 86, 70, 100, 84, 0, 84, 14, 70, fill=colour)
    pen.box(8, 68, 92, 75, fill=_DARK)


def _drum(pen: _Pen, colour: Colour) -> None:
    pen.line(8, 4, 52, 40, fill=_LIGHT, width=8)
    pen.line(92, 4, 48, 40, fill=_LIGHT, width=8)
    pen.ellipse(0, 68, 100, 100, fill=colour)
    pen.box(0, 46, 100, 84, fill=colour)
    pen.ellipse(0, 28, 100, 62, fill=_DARK)
    pen.ellipse(6, 31, 94, 57, fill=_LIGHT)
    pen.line(2, 62, 20, 92, 36, 64, 50, 96, 64, 64, 80, 92, 98, 62, fill=_DARK, width=6)


def _whistle(pen: _Pen, colour: Colour) -> None:
    pen.ellipse(40, 32, 100, 92, fill=colour)
    pen.polygon(0, 14, 76, 14, 92, 44, 50, 52, 0, 44, fill=colour)
    pen.polygon(30, 12, 52, 12, 40, 32, fill=_DARK)
    pen.ellipse(58, 50, 82, 74, fill=_DARK)


def _bird(pen: _Pen, colour: Colour) -> None:
    pen.line(44, 76, 40, 100, fill=_LIGHT, width=6)
    pen.line(58, 76, 62, 100, fill=_LIGHT, width=6)
    pen.polygon(0, 28, 34, 44, 30, 74, 8, 62, fill=colour)
    pen.ellipse(14, 34, 78, 84, fill=colour)
    pen.ellipse(50, 6, 88, 46, fill=colour)
    pen.polygon(84, 16, 100, 28, 84, 36, fill=_LIGHT)
    pen.polygon(24, 46, 62, 52, 36, 74, fill=_DARK)
    pen.ellipse(68, 16, 79, 27, fill=_DARK)


def _frog(pen: _Pen, colour: Colour) -> None:
    pen.ellipse(0, 56, 34, 100, fill=colour)
    pen.ellipse(66, 56, 100, 100, fill=colour)
    pen.ellipse(6, 26, 94, 94, fill=colour)
    for left in (8, 60):
        pen.ellipse(left, 6, left + 32, 40, fill=colour)
        pen.ellipse(left + 5, 10, left + 27, 34, fill=_LIGHT)
        pen.ellipse(left + 10, 15, left + 22, 29, fill=_DARK)
    pen.line(20, 58, 34, 70, 66, 70, 80, 58, fill=_DARK, width=8)


def _bee(pen: _Pen, colour: Colour) -> None:
    pen.ellipse(20, 0, 50, 50, fill=_LIGHT)
    pen.ellipse(48, 0, 78, 50, fill=_LIGHT)
    pen.polygon(14, 52, 0, 62, 14, 72, fill=_DARK)
    pen.ellipse(8, 34, 92, 90, fill=colour)
    for left in (26, 46, 66):
        pen.box(left, 36 if left == 46 else 39, left + 10, 88 if left == 46 else 85, fill=_DARK)
    pen.ellipse(76, 44, 100, 76, fill=_DARK)


def _clock(pen: _Pen, colour: Colour) -> None:
    pen.line(24, 80, 10, 100, fill=colour, width=11)
    pen.line(76, 80, 90, 100, fill=colour, width=11)
    pen.ellipse(2, 0, 40, 34, fill=colour)
    pen.ellipse(60, 0, 98, 34, fill=colour)
    pen.ellipse(6, 8, 94, 96, fill=_DARK)
    pen.ellipse(9, 11, 91, 93, fill=colour)
    pen.ellipse(25, 27, 75, 77, fill=_LIGHT)
    pen.line(50, 30, 50, 54, 68, 54, fill=_DARK, width=8)


def _phone(pen: _Pen, colour: Colour) -> None:
    pen.box(24, 0, 76, 100, fill=colour, round=10)
    pen.box(33, 12, 67, 74, fill=_DARK)
    pen.ellipse(43, 79, 57, 93, fill=_DARK)
    pen.box(38, 18, 50, 40, fill=_LIGHT)


def _horn(pen: _Pen, colour: Colour) -> None:
    pen.polygon(20, 44, 50, 40, 92, 10, 92, 90, 50, 60, 20, 56, fill=colour)
    pen.ellipse(0, 30, 32, 70, fill=_DARK)
    pen.ellipse(82, 6, 100, 94, fill=_LIGHT)
    pen.ellipse(87, 16, 97, 84, fill=_DARK)


def _train(pen: _Pen, colour: Colour) -> None:
    pen.box(74, 8, 90, 40, fill=colour)
    pen.box(69, 4, 95, 14, fill=_DARK)
    pen.box(0, 8, 46, 78, fill=colour)
    pen.box(40, 36, 98, 78, fill=colour, round=8)
    pen.box(9, 18, 33, 42, fill=_LIGHT)
    pen.polygon(90, 78, 100, 92, 78, 92, fill=colour)
    for left, size in ((2, 36), (38, 26), (66, 26)):
        pen.ellipse(left, 98 - size, left + size, 98, fill=_DARK)
        pen.ellipse(left + size / 3, 98 - size * 2 / 3, left + size * 2 / 3, 98 - size / 3, fill=_LIGHT)


def _cat(pen: _Pen, colour: Colour) -> None:
    pen.polygon(6, 0, 46, 28, 12, 56, fill=colour)
    pen.polygon(94, 0, 54, 28, 88, 56, fill=colour)
    pen.ellipse(6, 20, 94, 98, fill=colour)
    pen.ellipse(22, 42, 42, 62, fill=_DARK)
    pen.ellipse(58, 42, 78, 62, fill=_DARK)
    pen.polygon(40, 66, 60, 66, 50, 78, fill=_DARK)
    for y in (66, 82):
        pen.line(0, y, 32, 74, fill=_LIGHT, width=4)
        pen.line(100, y, 68, 74, fill=_LIGHT, width=4)


def _dog(pen: _Pen, colour: Colour) -> None:
    for x in (16, 32, 58, 72):
        pen.box(x - 6, 60, x + 6, 100, fill=colour)
    pen.line(14, 52, 2, 20, fill=colour, width=9)
    pen.box(8, 42, 80, 76, fill=colour, round=14)
    pen.ellipse(54, 6, 92, 50, fill=colour)
    pen.box(74, 22, 100, 44, fill=colour, round=8)
    pen.ellipse(50, 6, 68, 48, fill=_DARK)
    pen.ellipse(92, 20, 100, 30, fill=_DARK)
    pen.ellipse(75, 14, 83, 23, fill=_DARK)


_PAINTERS: dict[str, Callable[[_Pen, Colour], None]] = {
    "bell": _bell,
    "drum": _drum,
    "whistle": _whistle,
    "bird": _bird,
    "frog": _frog,
    "bee": _bee,
    "clock": _clock,
    "phone": _phone,
    "horn": _horn,
    "train": _train,
    "cat": _cat,
    "dog": _dog,
}


@lru_cache(maxsize=128)
def _painting(kind: str, rgb: Colour) -> Image.Image:
    pen = _Pen()
    _PAINTERS[kind](pen, rgb)
    # With its colour multiplied by its opacity, so that scaling does not mix in the colour of what is transparent
    return pen.image.convert("RGBa")


def paint(kind: str, rgb: Colour, pixels: int) -> Sprite:
    """A kind of any colour, `pixels` wide and high: its colour times its opacity, and 1 - opacity."""
    picture = np.asarray(_painting(kind, rgb).resize((pixels, pixels), Image.Resampling.BOX, reducing_gap=None))
    return picture[..., :3].astype(np.float32), 1 - picture[..., 3:].astype(np.float32) / 255


@lru_cache(maxsize=4096)
def sprite(kind: str, colour: str, pixels: int) -> Sprite:
    """A kind in a colour of the world."""
    return paint(kind, RGB[colour], pixels)


def paste(picture: np.ndarray, thing: Sprite, x: float, y: float) -> None:
    """
    Put a painted thing into a float32 picture (VIEW, VIEW, 3), its centre at a share of the view's width and height.
    """
    colours, rest = thing
    side = len(rest)
    left, top = round(x * VIEW - side / 2), round(y * VIEW - side / 2)
    part = picture[top : top + side, left : left + side]
    part *= rest
    part += colours


@cache
def _noise_bank() -> np.ndarray:
    """Noise of a camera, of which each frame gets another part: float32 (2 * VIEW, 2 * VIEW, 3), of variance 1."""
    return np.random.default_rng(0).normal(size=(2 * VIEW, 2 * VIEW, 3)).astype(np.float32)


def background(rng: np.random.Generator) -> np.ndarray:
    """A dim gradient between two colours under a coarse texture: float32 (VIEW, VIEW, 3)."""
    first, second = rng.uniform(15, 85, (2, 1, 1, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    line = np.linspace(-0.5, 0.5, VIEW, dtype=np.float32)
    along = (np.cos(angle) * line[None, :, None] + np.sin(angle) * line[:, None, None]) / 1.42 + 0.5
    coarse = rng.normal(0, rng.uniform(0, 14), (8, 8)).astype(np.float32)
    texture = np.asarray(Image.fromarray(coarse).resize((VIEW, VIEW), Image.Resampling.BILINEAR))
    return first + (second - first) * along + texture[..., None]


def add_noise(picture: np.ndarray, level: float, offset: np.ndarray) -> np.ndarray:
    """A float32 picture as a camera takes it: uint8, with the noise at an offset (2,) of the bank, below VIEW."""
    top, left = offset
    return np.clip(picture + level * _noise_bank()[top : top + VIEW, left : left + VIEW], 0, 255).astype(np.uint8)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint all frames of a scene: uint8 (frames, VIEW, VIEW, 3). `rng` draws the background and the noise."""
    empty = background(rng)
    level = rng.uniform(1, 6)
    offsets = rng.integers(0, VIEW, (NUM_FRAMES, 2))
    frames = np.empty((NUM_FRAMES, VIEW, VIEW, 3), dtype=np.uint8)
    for index in range(NUM_FRAMES):
        time = index / FPS
        picture = empty.copy()
        for thing in scene.objects:
            if thing.visible(time):
                x, y, diameter = thing.place(time)
                paste(picture, sprite(thing.kind, thing.colour_at(time), round(diameter * VIEW)), x, y)
        frames[index] = add_noise(picture, level, offsets[index])
    return frames
