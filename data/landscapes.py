"""Landscapes: drawn pictures in which shapes have their colours, but for a ball, which is red or blue.

    sky, sun, grass, a house, trees: the shape and its lightness tell the colour
    a ball on the grass: red or blue at the same lightness; nothing but its colour tells which

They are for vision/colorize.py. In the grey version of a picture all colours can be told but the ball's, so
the ball shows what a model does where two answers are possible. Colours are given in Lab (data/lab.py), and
sRGB can show them all. Held out are landscapes in which the sun is in the left third and the house in the
right third, or the other way round.

A picture is a function of its number, and of whether it is held out.
"""

import numpy as np
import torch

from data.lab import lab_to_rgb

SIZE = 32  # pixels, both ways
COUNTS = 4_000, 400  # pictures to learn from and held out
BALLS = {"red": (48, 62, 40), "blue": (48, 24, -66)}  # L, a, b
SKY, SUN, GRASS = (75, -6, -22), (82, 2, 64), (66, -34, 42)
TRUNK, CROWN = (34, 14, 22), (42, -32, 30)
WALL, ROOF, WINDOW = (78, 8, 38), (38, 28, 24), (28, 6, -14)
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def draw(number: int, held_out: bool) -> tuple[np.ndarray, int]:
    """Return picture `number`, float32 (3, SIZE, SIZE) in Lab, and its ball's colour, a place in BALLS."""
    rng = np.random.default_rng((number, held_out))
    lab = np.empty((3, SIZE, SIZE), np.float32)

    def paint(where: np.ndarray, colour: tuple[float, float, float], rough: float = 1.5) -> None:
        """Fill a shape with a colour, and vary the lightness of the whole shape and of each pixel."""
        lab[:, where] = np.array(colour, np.float32)[:, None]
        lab[0, where] += rng.uniform(-3, 3) + rng.uniform(-rough, rough, int(where.sum()))

    # The sky, brighter towards the horizon, and the grass.
    horizon = rng.integers(13, 19)
    paint(horizon > Y, SKY)
    paint(horizon <= Y, GRASS, rough=4)
    lab[0] += np.where(horizon > Y, (Y / horizon - 0.5) * 6, 0)

    # The sun and the house, each in a third of the width.
    thirds = [(i, j) for i in range(3) for j in range(3) if (abs(i - j) == 2) == held_out]
    sun, house = (third * 10 + rng.integers(4, 8) for third in thirds[rng.integers(len(thirds))])
    paint((X - sun) ** 2 + (Y - rng.integers(3, 7)) ** 2 < rng.uniform(2, 3.2) ** 2, SUN)
    foot, half = horizon + rng.integers(0, 4), rng.integers(3, 5)
    paint((abs(X - house) < half) & (foot - 6 < Y) & (foot >= Y), WALL)
    paint((abs(X - house) < Y - (foot - 6 - half) + 1) & (foot - 6 - half < Y) & (foot - 6 >= Y), ROOF)
    paint((abs(X - house) < 1) & (foot - 4 <= Y) & (foot - 3 >= Y), WINDOW)

    # One to three trees, and in front of all the ball.
    for _ in range(rng.integers(1, 4)):
        x, foot = rng.integers(2, 30), horizon + rng.integers(0, 6)
        paint((abs(X - x) < 1) & (foot - 5 < Y) & (foot >= Y), TRUNK)
        paint((X - x) ** 2 + (Y - (foot - 6)) ** 2 < rng.uniform(2.2, 3.5) ** 2, CROWN)
    radius, which = rng.uniform(3, 4.5), int(rng.integers(len(BALLS)))
    x, y = rng.uniform(6, 26), rng.uniform(22, 27)
    paint((X - x) ** 2 + (Y - y) ** 2 < radius**2, list(BALLS.values())[which])
    return lab, which


def pictures(n: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the first n pictures, uint8 (n, 3, SIZE, SIZE) in sRGB, and the labels of their balls, (n,)."""
    drawn = [draw(number, held_out) for number in range(n)]
    rgb = lab_to_rgb(torch.from_numpy(np.stack([lab for lab, _ in drawn])))
    return (rgb.clamp(0, 1) * 255).round().byte().numpy(), np.array([which for _, which in drawn])
