"""The activations of the text encoders and of the transformers."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from catversion_jax.utils.types import Array, Float


def gelu(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """The exact GELU. Source: Hendrycks and Gimpel 2016; the form is PyTorch's, on a TPU jax.nn.gelu's."""
    # Its erfc is two functions and a choice between them, one of which XLA keeps for the gradient; but on a TPU it
    # computes the activation twice where it is by erf (docs/performance.md).
    if jax.default_backend() == "tpu":
        return jax.nn.gelu(x, approximate=False)
    # 1 + erf needs float32, or its tail is lost.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP: SD 1.x
    "gelu": gelu,  # OpenCLIP: SD 2.x
}
