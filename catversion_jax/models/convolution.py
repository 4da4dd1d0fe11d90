"""3x3 convolutions, whose gradient may use a copy of their kernel that was turned around once."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.models.parametrized import ZEROS
from catversion_jax.utils.types import Array, Float, Params

TURNED = "turned"
"""The collection of the turned kernels: [3, 3, out, in], upside down."""


def convolve(x: Float[Array, "B h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "B h w o"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_vjp
def convolve_frozen(
    x: Float[Array, "B h w i"], kernel: Float[Array, "3 3 i o"], turned: Float[Array, "3 3 o i"]
) -> Float[Array, "B h w o"]:
    """`convolve`, which can be differentiated by x alone."""
    return convolve(x, kernel)


convolve_frozen.defvjp(
    lambda x, kernel, turned: (convolve(x, kernel), turned),
    lambda turned, gradient: (convolve(gradient, turned), None, None),
)


class Conv3x3(nn.Module):
    """flax.linen.Conv of that size, with zeros around the image and the same parameters.

    If the collection TURNED is given, the kernel is taken to be frozen: its gradient is zero.
    """

    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w {self.channels}"]:
        kernel = self.param("kernel", ZEROS, (3, 3, x.shape[-1], self.channels))
        bias = self.param("bias", ZEROS, (self.channels,))
        turned: Any = self.get_variable(TURNED, "kernel")
        x, kernel, bias, turned = promote_dtype(x, kernel, bias, turned, dtype=self.dtype)
        return (convolve(x, kernel) if turned is None else convolve_frozen(x, kernel, turned)) + bias


@jax.jit
def turned_kernels(params: Params) -> Params:
    """Returns the collection TURNED of a network's parameters."""
    kernels = {path: leaf for path, leaf in flatten_dict(params).items() if leaf.shape[:2] == (3, 3)}
    return unflatten_dict({path: jnp.swapaxes(leaf[::-1, ::-1], 2, 3) for path, leaf in kernels.items()})
