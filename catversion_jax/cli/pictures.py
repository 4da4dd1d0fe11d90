"""What the two ways to sample pictures share: LoRAs, and pictures as files."""

from functools import partial

import numpy as np
from absl import flags
from PIL import Image

from catversion_jax.api.pipeline import Pipeline
from catversion_jax.cli.flags import given_loras
from catversion_jax.sampling.picture_record import PictureRecord, png_info, texts_of
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.types import UInt8


def with_loras(pipe: Pipeline, arguments: flags.FlagValues) -> Pipeline:
    """Returns the pipeline with the LoRAs of --lora."""
    for path, scale in given_loras(arguments):
        pipe = pipe.with_lora(path, scale)
    return pipe


def lora_sources(pipe: Pipeline, arguments: flags.FlagValues) -> dict[str, str]:
    """Returns the files of --lora by their digests."""
    return {used.digest: path for used, (path, _) in zip(pipe.loras, given_loras(arguments), strict=True)}


def save_picture(path: AnyPath, image: UInt8[np.ndarray, "H W 3"], record: PictureRecord) -> None:
    """Writes an image as a PNG file that says how it was made, completely or not at all."""
    write_atomically(path, partial(Image.fromarray(image).save, pnginfo=png_info(texts_of(record))))
