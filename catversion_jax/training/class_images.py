"""The base model's images of the class, which a method that preserves a prior learns beside the photos.

They remain latents, so the VAE is not used.
"""

import hashlib
import io
import math
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.sampling.sampler import SampleRequest, sample_latents
from catversion_jax.utils.errors import short
from catversion_jax.utils.files import read_bytes, write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.types import Float

MOST_HEADER = 4096
"""More than the header of a .npy file and a digest take."""


def class_latents(
    config: Config, pipeline: BasePipeline, prompts: Sequence[str], kept: AnyPath | None
) -> Float[np.ndarray, "N h w c"]:
    """Returns the latents of images of the prompts in turn; they are not sampled again if the file `kept` has them."""
    count = config.prior.pictures
    latents = read_latents(kept, (count, *pipeline.networks.latent_shape)) if kept else None
    if latents is not None:
        return latents
    asked = tuple(prompts[i % len(prompts)] for i in range(count))
    sampled = sample_class(pipeline, SampleRequest(asked, tuple(range(count)), config.sample.sampler))
    if kept:
        write_atomically(kept, lambda path: path.write_bytes(latents_to_npy(sampled)))
    return sampled


def sample_class(pipeline: BasePipeline, request: SampleRequest) -> Float[np.ndarray, "N h w c"]:
    """Samples the latents of the request's images, with a progress bar."""
    parts = []
    with tqdm(total=len(request.prompts), unit=" images", desc="of the class", leave=False) as bar:
        for latents, real in sample_latents(pipeline, request):
            parts.append(np.asarray(latents)[:real])
            bar.update(real)
    return np.concatenate(parts)


def latents_to_npy(latents: Float[np.ndarray, "..."]) -> bytes:
    """Returns the latents as a .npy file with a digest behind it."""
    file = io.BytesIO()
    np.save(file, latents, allow_pickle=False)
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


def latents_from_npy(data: bytes, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Returns what `latents_to_npy` was given. Raises an error for anything else; older files have no digest."""
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    if np.lib.format.read_array_header_1_0(file) != (shape, False, np.dtype(np.float32)):
        raise ValueError("other latents than this run needs")
    start, end = file.tell(), file.tell() + 4 * math.prod(shape)
    if len(data) < end or data[end:] not in (b"", hashlib.sha256(data[:end]).digest()):
        raise ValueError("damaged")
    return np.frombuffer(data[start:end], np.float32).reshape(shape)


def read_latents(path: AnyPath, shape: tuple[int, ...]) -> Float[np.ndarray, "..."] | None:
    """Returns the file's latents; None if there is no file or, with a warning, if it is damaged or has others."""
    if not path.exists():
        return None
    try:
        data = read_bytes(path, 4 * math.prod(shape) + MOST_HEADER, "expected latents of this run's class images")
        return latents_from_npy(data, shape)
    except OSError:
        raise
    except Exception as error:  # numpy's parser of headers raises whatever it stumbles over
        warn(f"{path}: {short(error)}; the images of the class are sampled again")
        return None
