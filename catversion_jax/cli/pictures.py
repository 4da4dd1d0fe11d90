"""Pictures as files."""

from functools import partial

import numpy as np
from PIL import Image

from catversion_jax.sampling.picture_record import PictureRecord, png_info, texts_of
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.types import UInt8


def save_picture(path: AnyPath, image: UInt8[np.ndarray, "H W 3"], record: PictureRecord) -> None:
    """Writes an image as a PNG file that says how it was made, completely or not at all."""
    write_atomically(path, partial(Image.fromarray(image).save, pnginfo=png_info(texts_of(record))))
