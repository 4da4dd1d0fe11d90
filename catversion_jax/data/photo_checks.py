"""Warnings about photos to train on: what is likely to be learned although nobody wants it."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from catversion_jax.data.photos import Photo
from catversion_jax.utils.types import Float

THUMBNAIL = 16
ALIKE = 4.0
"""The largest mean difference, of 255, of the small grey pictures of two photos that are nearly the same."""
MEASURED = 256
"""Pixels along a side at which sharpness is measured, at most."""
SHARP = 0.03
"""The least share of a sharp photo's variance that a Laplacian gives. Of the first 60 photos of DreamBooth's set at 512
pixels the least is 0.059; blurred by 3 pixels, half of them have less than 0.007, and the most 0.037."""
AT_EDGE = 0.05
"""The share of an edge that a subject covers if it is cut off there; less is a shadow or a stray point."""


def grey(photo: Photo, most: int) -> Float[np.ndarray, "h w"]:
    """Returns a photo in grey, of at most `most` pixels along a side."""
    image = Image.fromarray(photo.image).convert("L")
    side = min(most, *image.size)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)


def check_photos(photos: Sequence[Photo]) -> list[list[str]]:
    """Returns the warnings of each photo, none for one that is as it should be."""
    small = [grey(photo, THUMBNAIL) for photo in photos]
    return [
        [*too_small(photo), *blurred(photo), *cut_off(photo), *same_as(small[i], zip(photos[:i], small, strict=False))]
        for i, photo in enumerate(photos)
    ]


def too_small(photo: Photo) -> list[str]:
    side, shorter = photo.image.shape[0], min(photo.size)
    if shorter == 0 or shorter >= side:
        return []
    return [f"too small: {photo.size[0]}x{photo.size[1]}, enlarged to {side}"]


def blurred(photo: Photo) -> list[str]:
    image = grey(photo, MEASURED)
    middle = image[1:-1, 1:-1]
    edges = 4 * middle - image[:-2, 1:-1] - image[2:, 1:-1] - image[1:-1, :-2] - image[1:-1, 2:]
    share = float(edges.var() / (image.var() + 1e-6))
    return [f"blurred: sharpness {share:.4f}"] if share < SHARP else []


def cut_off(photo: Photo) -> list[str]:
    if photo.mask is None:
        return []
    edges = {"top": photo.mask[0], "bottom": photo.mask[-1], "left": photo.mask[:, 0], "right": photo.mask[:, -1]}
    cut = [name for name, edge in edges.items() if edge.mean() > AT_EDGE]
    return [f"subject cut off: {', '.join(cut)}"] if cut else []


def same_as(small: Float[np.ndarray, "h w"], others: Iterable[tuple[Photo, Float[np.ndarray, "h w"]]]) -> list[str]:
    """Compares a small grey picture with those of the photos before it, also mirrored."""
    for other, theirs in others:
        if min(np.abs(small - theirs).mean(), np.abs(small[:, ::-1] - theirs).mean()) < ALIKE:
            return [f"nearly the same as {other.name}"]
    return []
