"""Draws README's first picture from `make demo`'s run: some of the photos, and a few images of the concept, large.

    catversion generate --embedding=runs/demo --num=4 --out=runs/figure --prompt=...  # the prompts below
    python docs/figure.py

Of the four seeds of each prompt, SEEDS names the one that is shown.
"""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
PHOTOS = sorted((ROOT / "catversion_jax" / "concepts" / "teapot" / "train").iterdir())[:4]
IMAGES = ROOT / "runs" / "figure"
SEEDS = {
    "a photo of a teapot on the beach": 2,
    "a photo of a teapot in the snow": 2,
    "a photo of a teapot in the jungle": 3,
    "a photo of a teapot in space": 0,
}
SIDE, GAP, MARGIN, FONT = 224, 12, 16, 17


def main() -> None:
    small = (SIDE - GAP) // 2
    images = {}
    for prompt, seed in SEEDS.items():
        (path,) = IMAGES.glob(f"{prompt.replace(' ', '-')}_*_{seed}.png")
        images[prompt] = Image.open(path)
    font = ImageFont.load_default(FONT)
    left = MARGIN + SIDE + 5 * GAP  # of the first image; the rule stands before it
    top, height = MARGIN + 2 * FONT, MARGIN + 2 * FONT + SIDE + 3 * FONT + MARGIN
    canvas = Image.new("RGB", (left + len(images) * (SIDE + GAP) - GAP + MARGIN, height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), "your photos", "black", font)
    for i, path in enumerate(PHOTOS):
        photo = Image.open(path).convert("RGB").resize((small, small), Image.Resampling.BICUBIC)
        canvas.paste(photo, (MARGIN + i % 2 * (small + GAP), top + i // 2 * (small + GAP)))
    pen.line([(left - 3 * GAP, MARGIN), (left - 3 * GAP, height - MARGIN)], "lightgrey", 2)
    pen.text((left, MARGIN), "your teapot, by prompt", "black", font)
    for i, (prompt, image) in enumerate(images.items()):
        x = left + i * (SIDE + GAP)
        canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, top))
        caption = textwrap.fill(prompt, 26)
        pen.multiline_text((x, top + SIDE + 6), caption, "dimgrey", font)
    canvas.save(ROOT / "docs" / "teapot.png", optimize=True)


if __name__ == "__main__":
    main()
