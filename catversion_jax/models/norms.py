"""Layer normalization with a gradient of its own, which keeps nothing but the input."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from catversion_jax.models.parametrized import ZEROS
from catversion_jax.utils.types import AnyArray, Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_normalize(
    x: Float[Array, "*B C"], scale: Float[AnyArray, "C"], bias: Float[AnyArray, "C"], epsilon: float
) -> Float[Array, "*B C"]:
    """Normalizes the channels of each position, then scales and shifts.

    Mean and variance are computed in float32; the result has the dtype of x, and is NaN where the variance is beyond
    float32. Source: Ba et al. 2016.
    """
    normal, _ = normalized(x, epsilon)
    return (normal * scale + bias).astype(x.dtype)


def normalized(x, epsilon: float) -> tuple[Float[Array, "*B C"], Float[Array, "*B 1"]]:
    """Returns the normalized input and the inverse of its standard deviation, in float32."""
    # One mean after the other, of which XLA's GPU backend makes one kernel; of two side by side it makes three.
    centered = x.astype(jnp.float32)
    centered = centered - centered.mean(-1, keepdims=True)
    variance = (centered * centered).mean(-1, keepdims=True)
    # Of a variance beyond float32 the rate would be 0, and what went wrong would pass for a finite number.
    rate = jnp.where(jnp.isfinite(variance), jax.lax.rsqrt(variance + epsilon), jnp.nan)
    return centered * rate, rate


def layer_normalize_forward(x, scale, bias, epsilon):
    return layer_normalize(x, scale, bias, epsilon), (x, scale, bias)


def layer_normalize_backward(epsilon, kept, gradient):
    x, scale, bias = kept
    # Computed again: differentiated as it is written, the norm would keep float32 arrays of the size of x.
    normal, rate = normalized(x, epsilon)
    outer = gradient.astype(jnp.float32)
    inner = outer * scale
    first, second = (y.mean(-1, keepdims=True) for y in (inner, inner * normal))
    of_x = rate * (inner - first - normal * second)
    of_scale, of_bias = (y.reshape(-1, y.shape[-1]).sum(0) for y in (outer * normal, outer))
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


layer_normalize.defvjp(layer_normalize_forward, layer_normalize_backward)


class LayerNorm(nn.Module):
    """flax.linen.LayerNorm, with its names."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*B c"]) -> Float[Array, "*B c"]:
        scale, bias = (self.param(name, ZEROS, x.shape[-1:]) for name in ("scale", "bias"))
        return layer_normalize(x.astype(self.dtype), scale, bias, self.epsilon)
