"""Draws docs/pictures.png from `make demo`'s run: another size, a picture drawn anew, and one drawn inside a mask.

python docs/pictures.py
"""

from pathlib import Path

import numpy as np
from PIL import Image

import catversion_jax as cv
from catversion_jax.utils.image_grid import grid

ROOT = Path(__file__).parents[1]
PROMPT = "a photo of a teapot on the beach"
BOX = (6, 4, 60, 60)


def main() -> None:
    pipe, teapot = cv.Pipeline.from_pretrained(), cv.Concept.load(ROOT / "runs" / "demo")
    (wide,) = pipe(PROMPT, concepts=teapot, width=104, height=64, seed=1)
    (dog,) = pipe("a photo of a dog on the beach", seed=1)
    mask = Image.new("L", dog.size)
    mask.paste(255, BOX)
    anew = [pipe(PROMPT, concepts=teapot, image=dog, denoise=share)[0] for share in (0.3, 0.6)]
    inside = [pipe(PROMPT, concepts=teapot, image=dog, mask=mask, denoise=1.0, seed=seed)[0] for seed in (0, 1)]
    rows = {
        "width=104": [wide],
        "image=..., denoise=0.3 and 0.6": [dog, *anew],
        "image=..., mask=...": [dog, mask.convert("RGB"), *inside],
    }
    grid([[np.asarray(image) for image in row] for row in rows.values()], list(rows)).save(
        ROOT / "docs" / "pictures.png"
    )


if __name__ == "__main__":
    main()
