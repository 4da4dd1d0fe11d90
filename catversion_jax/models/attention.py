"""Scaled dot-product attention, by what runs best where it runs: a table of kernels for each backend."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from catversion_jax.types import Array, Float

CHUNK = 512
"""Queries at a time, of `in_chunks`."""


def heads_first(
    query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"], value: Float[Array, "B K H D"]
) -> Float[Array, "B Q H D"]:
    """Plain matrix products, which XLA runs 1.5 to 2 times faster on a CPU, with their gradient, than the layout of
    `jax.nn.dot_product_attention` (docs/performance.md)."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    logits = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.nn.softmax(logits).astype(value.dtype) @ value, 1, 2)


def in_chunks(
    query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"], value: Float[Array, "B K H D"]
) -> Float[Array, "B Q H D"]:
    """A part of the queries at a time, the logits computed anew for the gradient: what flash attention saves in memory,
    for devices without a kernel for it."""
    batch, positions, heads, size = query.shape
    chunks = positions // CHUNK
    parts = jnp.moveaxis(query.reshape(batch, chunks, CHUNK, heads, size), 1, 0)
    attend = jax.checkpoint(lambda part: jax.nn.dot_product_attention(part, key, value))
    return jnp.moveaxis(jax.lax.map(attend, parts), 0, 1).reshape(query.shape)


class Kernel(NamedTuple):
    """How attention can be computed, and for which shapes (of the query and the key) and dtype."""

    run: Callable
    suits: Callable[[tuple[int, ...], tuple[int, ...], jnp.dtype], bool]


def fits_cudnn(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Flash attention is for half precision and heads of up to 128 channels; it pays where positions are many."""
    return dtype.itemsize == 2 and query[3] <= 128 and query[3] % 8 == 0 and min(query[1], key[1]) >= 256


def is_long(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> bool:
    return query[1] * key[1] >= 2**20 and query[1] % CHUNK == 0


def always(*_) -> bool:
    return True


XLA = Kernel(jax.nn.dot_product_attention, always)
KERNELS = {
    "cpu": (Kernel(heads_first, always),),
    "gpu": (Kernel(partial(jax.nn.dot_product_attention, implementation="cudnn"), fits_cudnn), XLA),
    "tpu": (Kernel(in_chunks, is_long), XLA),
}
"""backend -> kernels; the first that suits is taken."""


def dot_product_attention(
    query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"], value: Float[Array, "B K H D"]
) -> Float[Array, "B Q H D"]:
    """Softmax attention, logits and softmax in float32."""
    kernels = KERNELS.get(jax.default_backend(), (XLA,))
    kernel = next(kernel for kernel in kernels if kernel.suits(query.shape, key.shape, query.dtype))
    return kernel.run(query, key, value)


def probabilities(query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"]) -> Float[Array, "B Q K"]:
    """What attention gives to each key, the mean over heads, float32: for those who want to look at it."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits).mean(1)
