"""Pictures of a run: rows of images, with a text beside each row or under each image.

A task's `show` calls `save`, which writes picture.png into the run's directory. The log keeps a copy for each
evaluation, pictures/N.png at step N, and report.html holds the pictures inside, so that it loads no file.

Pixels are drawn as squares, without smoothing. Shapes: C channels, H x W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from engine.report import PICTURE
from formats import atomic

CELL = 64  # an image is enlarged by the whole factor that brings its longer side nearest to so many pixels
GAP, LINE = 6, 18  # pixels between images, and of a line of text
INK, PAPER = "#22252a", "#fdfdfb"


def save(
    out: Path,
    rows: Sequence[Sequence[Tensor]],
    texts: Sequence[Sequence[str]] | None = None,
    colours: Sequence[Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
    name: str = PICTURE,
) -> None:
    """Write picture.png into out: rows of images (C, H, W) of one size with values in [0, 1], C 1 or 3.

    texts: a line under each image. colours: of these lines, by default dark grey. labels: a text to the left
    of each row. name: the file's name.
    """
    from PIL import Image, ImageDraw

    from data import glyphs

    # The size of a cell: the image enlarged, and below it the text.
    _, H, W = rows[0][0].shape
    factor = max(1, round(CELL / max(H, W)))
    width, height = factor * W + GAP, factor * H + GAP + (LINE if texts else 0)
    font = glyphs.open_font("DejaVuSans", LINE - 5)
    left = GAP + (round(max(map(font.getlength, labels))) + GAP if labels else 0)
    canvas = Image.new("RGB", (left + width * max(map(len, rows)), height * len(rows) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)

    # The cells, row by row.
    for i, row in enumerate(rows):
        y = GAP + i * height
        if labels:
            draw.text((GAP, y + factor * H / 2), labels[i], INK, font, "lm")
        for j, image in enumerate(row):
            x = left + j * width
            canvas.paste(enlarged(image, factor), (x, y))
            if texts:
                ink = colours[i][j] if colours else INK
                draw.text((x + factor * W / 2, y + factor * H + LINE / 2), texts[i][j], ink, font, "mm")
    with atomic.replace_file(out / name) as new:
        canvas.save(new, format="png")


def enlarged(image: Tensor, factor: int):
    """Return an image (C, H, W) as a colour image of Pillow's, each pixel a square of factor x factor."""
    from PIL import Image

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    array = np.broadcast_to(pixels.permute(1, 2, 0).numpy(), (*image.shape[1:], 3))
    return Image.fromarray(array.repeat(factor, 0).repeat(factor, 1))
