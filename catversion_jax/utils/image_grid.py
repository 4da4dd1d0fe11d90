"""Image grids with captions, for visual inspection."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from catversion_jax.utils.errors import one_line
from catversion_jax.utils.types import UInt8

CELL = 160  # minimum side of a cell in pixels: a small model's images are too small to judge
GAP = 6
FONT_SIZE = 16
LABEL_WIDTH = 144
LABEL_LENGTH = 200  # characters


def grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    row_labels: Sequence[str],
    captions: Sequence[str] = (),
    captions_above: int = 0,
) -> Image.Image:
    """Draws rows of images, each resized to fit its cell, with a label before each row. Cells are as large as the
    largest image, and at least CELL.

    One line of captions, one per column, stands above the row with index `captions_above`.
    """
    font = ImageFont.load_default(FONT_SIZE)
    height, width = (max(image.shape[axis] for row in rows for image in row) for axis in (0, 1))
    scale = max(1.0, CELL / min(height, width))
    height, width = round(height * scale), round(width * scale)
    titles = [wrap(caption, width) for caption in captions]
    band = max((title.count("\n") + 1 for title in titles), default=0) * (FONT_SIZE + 4) + GAP
    columns = max(len(row) for row in rows)
    size = (LABEL_WIDTH + columns * (width + GAP), GAP + band + len(rows) * (height + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    y = GAP
    for i, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        if i == captions_above:
            for j, title in enumerate(titles):
                draw.multiline_text((LABEL_WIDTH + j * (width + GAP), y), title, "black", font)
            y += band
        draw.multiline_text((GAP, y), wrap(label, LABEL_WIDTH), "black", font)
        for j, image in enumerate(row):
            cell = ImageOps.contain(Image.fromarray(image), (width, height), Image.Resampling.BICUBIC)
            canvas.paste(cell, (LABEL_WIDTH + j * (width + GAP), y))
        y += height + GAP
    return canvas


def reduced(image: UInt8[np.ndarray, "h w 3"], most: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image whose longer edge has at most `most` pixels; a smaller one as it is."""
    if max(image.shape[:2]) <= most:
        return image
    small = Image.fromarray(image)
    small.thumbnail((most, most), Image.Resampling.BICUBIC)
    return np.asarray(small)


def wrap(text: str, width: int) -> str:
    """Breaks a text into lines of at most about `width` pixels; a very long one is cut in its middle."""
    return textwrap.fill(one_line(text, LABEL_LENGTH), max(8, int(width / (FONT_SIZE * 0.55))))
