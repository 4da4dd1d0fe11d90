"""The picture that sampling starts from: redrawn as a whole (image to image), or inside a mask (inpainting)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from catversion_jax.base.pipeline import BasePipeline, Networks
from catversion_jax.data.images import HALF, damage_named, given_photo, our_limits
from catversion_jax.data.latents import posteriors
from catversion_jax.data.subject_masks import grey_of_mask, open_mask
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.types import Array, Bool, Float, UInt8

MAX_SIDE = 4096
"""Pixels along a side of an image, at most."""
ORIENTATION = 0x0112
"""The EXIF tag."""
DENOISE = 0.7
"""The share of the steps that are taken, unless it is given; other values were not compared."""


@dataclass(frozen=True, eq=False)
class PictureInput:
    pixels: UInt8[np.ndarray, "H W 3"]
    mask: Bool[np.ndarray, "H W"] | None = None  # True: drawn anew; the rest stays as it is
    denoise: float = DENOISE  # 0: nothing changes; 1: nothing of what is drawn anew remains

    @property
    def digest(self) -> str:
        """Sixteen digits that tell pictures and their masks apart."""
        mask = b"" if self.mask is None else self.mask.tobytes()
        return hashlib.sha256(f"{self.pixels.shape}".encode() + self.pixels.tobytes() + mask).hexdigest()[:16]

    def skipped(self, steps: int) -> int:
        """Returns how many of the steps are left out. Raises UserError if that is all of them."""
        if not 0 < self.denoise <= 1:
            raise UserError(f"denoise={self.denoise}: expected more than 0, at most 1")
        taken = int(steps * self.denoise)
        if taken == 0:
            raise UserError(
                f"denoise={self.denoise}: leaves none of the {steps} steps; give more steps, or a larger one"
            )
        return steps - taken

    def keep(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns an image with the picture's own pixels outside the mask."""
        return image if self.mask is None else np.where(np.expand_dims(self.mask, -1), image, self.pixels)


class Kept(NamedTuple):
    """What remains of a picture in the latents of a batch."""

    clean: Float[Array, "B h w c"]  # its latents
    noise: Float[Array, "B h w c"]
    drawn: Float[Array, "1 h w 1"]  # 1 where it is drawn anew, else 0


def clean_latents(pipeline: BasePipeline, picture: PictureInput) -> Float[np.ndarray, "1 h w c"]:
    """Returns the mean of the VAE's posterior, as the UNet takes it."""
    mean, _ = posteriors(pipeline.networks.vae, pipeline.params["vae"], picture.pixels[None], flip=False)
    return mean[:, 0]


def drawn_latents(mask: Bool[np.ndarray, "H W"], networks: Networks) -> Float[np.ndarray, "1 h w 1"]:
    """Returns the latents that are drawn anew: those with a pixel of the mask."""
    unit = networks.vae.config.downscale
    height, width = (side // unit for side in mask.shape)
    inside = mask.reshape(height, unit, width, unit).any((1, 3))
    return np.expand_dims(inside, (0, -1)).astype(np.float32)


def read_input(
    image: AnyPath | Image.Image,
    mask: AnyPath | Image.Image | None,
    denoise: float,
    networks: Networks,
    size: tuple[int, int] = (0, 0),
) -> PictureInput:
    """Reads a picture and a mask, whose bright or opaque part is drawn anew; both are cut and resized to `size`.

    A width or height of 0 keeps the picture's shape, with the shorter side as the model's own. Raises UserError, naming
    the file, for one that is no picture, and for a mask of another size or without a part.
    """
    photo = given_photo(image)
    unit, own = networks.vae.config.downscale, networks.resolution
    fitting = (round(side * own / min(photo.size) / unit) * unit for side in photo.size)
    width, height = (given or side for given, side in zip(size, fitting, strict=True))
    if max(width, height) > MAX_SIDE and 0 in size:
        raise UserError(f"a picture of {photo.size} would become {width}x{height}; give its width and height")
    check_size_of_image(width, height, networks)
    pixels = np.asarray(ImageOps.fit(photo, (width, height), Image.Resampling.BICUBIC))
    if mask is None:
        return PictureInput(pixels, None, denoise)
    name = Path("image") if isinstance(image, Image.Image) else image
    grey = turned_mask(mask, image) if isinstance(mask, Image.Image) else open_mask(mask, photo.size, name)
    if grey.size != photo.size:
        raise UserError(f"mask: {grey.size} pixels; expected {photo.size}, as its picture")
    # Any pixel counts, so that a thin part stays one when it is made smaller.
    marked = grey.point(lambda value: 255 if value > HALF else 0)
    drawn = np.asarray(ImageOps.fit(marked, (width, height), Image.Resampling.BOX)) > 0
    if not drawn.any():
        what = "mask" if isinstance(mask, Image.Image) else mask
        raise UserError(
            f"{what}: nothing in it, cut to {width}x{height}, is bright (above 127 of 255) or opaque, so nothing would "
            "be drawn; mark a part"
        )
    return PictureInput(pixels, drawn, denoise)


def turned_mask(mask: Image.Image, image: AnyPath | Image.Image) -> Image.Image:
    """Returns a mask in memory as 8-bit grey, turned as its picture is: it was drawn on that as it is stored."""
    with damage_named(Path("mask")), our_limits():
        orientation = image.getexif().get(ORIENTATION) if isinstance(image, Image.Image) else None
        if orientation and ORIENTATION not in mask.getexif():
            mask = mask.copy()
            mask.getexif()[ORIENTATION] = orientation
        return grey_of_mask(ImageOps.exif_transpose(mask))


def check_size_of_image(width: int, height: int, networks: Networks) -> None:
    """Raises UserError for a width or height that the networks do not give."""
    unit = networks.vae.config.downscale
    for name, pixels in (("width", width), ("height", height)):
        if pixels % unit or not unit <= pixels <= MAX_SIDE:
            raise UserError(f"{name}={pixels}: expected a multiple of {unit}, at most {MAX_SIDE}")
