"""Scaled dot-product attention, by what runs best where it runs: a table of kernels for each backend."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from catversion_jax.models.sharding import on_each_device
from catversion_jax.utils.types import Array, Float

BLOCK = 512
"""Queries, and keys, at a time, of `splash`."""


def heads_first(
    query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"], value: Float[Array, "B K H D"]
) -> Float[Array, "B Q H D"]:
    """Plain matrix products, which XLA runs 1.5 to 2 times faster on a CPU, with their gradient, than the layout of
    `jax.nn.dot_product_attention` (docs/performance.md)."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    logits = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.nn.softmax(logits).astype(value.dtype) @ value, 1, 2)


def splash(
    query: Float[Array, "B Q H D"],
    key: Float[Array, "B K H D"],
    value: Float[Array, "B K H D"],
    interpret: bool = False,
) -> Float[Array, "B Q H D"]:
    """Flash attention by JAX's Pallas kernel for TPUs, on each device's images and heads: XLA cannot split a kernel.
    `interpret` computes it on any device, slowly."""
    positions, heads, keys = *query.shape[1:3], key.shape[1]
    rows, columns = min(BLOCK, positions), min(BLOCK, keys)
    blocks = splash_attention.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )

    def attend(query, key, value):
        everything = splash_attention.FullMask((positions, keys))
        mask = splash_attention.MultiHeadMask([everything] * query.shape[2])
        kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        return jnp.swapaxes(jax.vmap(kernel)(query, key, value), 1, 2)

    return on_each_device(attend, heads)(query, key, value)


class Kernel(NamedTuple):
    """How attention can be computed, and for which shapes (of the query and the key) and dtype."""

    run: Callable
    suits: Callable[[tuple[int, ...], tuple[int, ...], jnp.dtype], bool]


def fits_cudnn(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Flash attention is for half precision and heads of up to 128 channels; it pays where positions are many."""
    return dtype.itemsize == 2 and query[3] <= 128 and query[3] % 8 == 0 and min(query[1], key[1]) >= 256


def fits_splash(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whole blocks; not measured: maxdiffusion takes it from 4096 positions on."""
    return min(query[1], key[1]) >= 1024 and query[1] % BLOCK == 0 == key[1] % BLOCK


def always(*_) -> bool:
    return True


XLA = Kernel(jax.nn.dot_product_attention, always)
KERNELS = {
    "cpu": (Kernel(heads_first, always),),
    "gpu": (Kernel(partial(jax.nn.dot_product_attention, implementation="cudnn"), fits_cudnn), XLA),
    "tpu": (Kernel(splash, fits_splash), XLA),
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
