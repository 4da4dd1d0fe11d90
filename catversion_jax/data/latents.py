"""The VAE's posterior of every photo, computed once: training only samples from it."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from catversion_jax.models.vae import AutoencoderKL
from catversion_jax.utils.compiler import jit
from catversion_jax.utils.types import Array, Float, Params, UInt8

BATCH = 4  # photos per call of the VAE


@partial(jit, static_argnames=("vae",))
def encode_images(params: Params, images: UInt8[Array, "B H W 3"], *, vae: AutoencoderKL):
    """Returns mean and standard deviation of the latents, scaled as the UNet takes them."""
    posterior: Any = vae.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1, method="encode")
    mean, logvar = posterior
    scale = vae.config.scaling_factor
    return mean * scale, jnp.exp(0.5 * logvar) * scale


def posteriors(
    vae: AutoencoderKL, params: Params, images: UInt8[np.ndarray, "N H W 3"], flip: bool
) -> tuple[Float[np.ndarray, "N F h w c"], Float[np.ndarray, "N F h w c"]]:
    """Returns mean and standard deviation for each photo and, with `flip`, for its mirror image (F = 2, else 1)."""
    views = 2 if flip else 1
    count = len(images) * views

    def view(index: int) -> UInt8[np.ndarray, "H W 3"]:
        image = images[index // views]
        return image[:, ::-1] if index % views else image

    # The last batch is filled with its last view, so that one compiled program serves all.
    batches = (np.stack([view(min(i, count - 1)) for i in range(at, at + BATCH)]) for at in range(0, count, BATCH))
    parts = [encode_images(params, batch, vae=vae) for batch in batches]
    mean, std = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    shape = (len(images), views, *mean.shape[1:])
    return mean.reshape(shape), std.reshape(shape)


def bucket(count: int) -> int:
    """The size to pad `count` items to, a power of two from 8 on: similar counts then share one compiled step."""
    return max(8, 1 << (count - 1).bit_length())


def pad(array: np.ndarray, size: int) -> np.ndarray:
    """Pads the first axis to `size` with zeros."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))
