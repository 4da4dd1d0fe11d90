"""Scaled dot-product attention, from a table of kernels for each backend: the first one that suits the shapes runs."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from catversion_jax.models.sharding import on_each_device
from catversion_jax.utils.types import Array, Float

BLOCK = 512
"""Queries and keys per block of `splash`."""


def heads_first(
    query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"], value: Float[Array, "B K H D"]
) -> Float[Array, "B Q H D"]:
    """Attention as two batched matrix products, with the heads in front of the positions."""
    # XLA's CPU backend runs batched [position, channel] products, with their gradient, 1.5 to 2 times faster than
    # the [batch, position, head, channel] einsums of jax.nn.dot_product_attention (docs/performance.md).
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    # Logits in float32 whatever the inputs: bfloat16 has 8 significant bits, so it rounds a logit between 16 and 32 by
    # up to 0.06, and exp turns that into an error of 6 % of the weight.
    logits = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.nn.softmax(logits).astype(value.dtype) @ value, 1, 2)


def splash(
    query: Float[Array, "B Q H D"],
    key: Float[Array, "B K H D"],
    value: Float[Array, "B K H D"],
    interpret: bool = False,
) -> Float[Array, "B Q H D"]:
    """Flash attention by JAX's Pallas kernel for TPUs, on each device's own images and heads.

    `interpret` runs the kernel on any device, slowly.
    """
    positions, heads, keys = *query.shape[1:3], key.shape[1]
    rows, columns = min(BLOCK, positions), min(BLOCK, keys)
    blocks = splash_attention.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )

    def attend(query, key, value):
        everything = splash_attention.FullMask((positions, keys))
        mask = splash_attention.MultiHeadMask([everything] * query.shape[2])
        # The kernel takes one image with the heads in front, and does not scale the logits.
        kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        return jnp.swapaxes(jax.vmap(kernel)(query, key, value), 1, 2)

    # XLA cannot partition a Pallas kernel as it does its own operations.
    return on_each_device(attend, heads)(query, key, value)


def cudnn(
    query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"], value: Float[Array, "B K H D"]
) -> Float[Array, "B Q H D"]:
    """Flash attention by cuDNN."""
    run = partial(jax.nn.dot_product_attention, implementation="cudnn")
    keys = key.shape[1]
    if keys % 2 == 0:
        return run(query, key, value)
    # JAX refuses odd lengths, such as the 77 tokens of a prompt.
    key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
    return run(query, key, value, key_value_seq_lengths=jnp.full(len(key), keys, jnp.int32))


class Kernel(NamedTuple):
    """An implementation of attention, and the shapes (of query and key) and the dtype that it suits."""

    run: Callable
    suits: Callable[[tuple[int, ...], tuple[int, ...], jnp.dtype], bool]


def fits_cudnn(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """cuDNN's flash attention takes half precision; it pays for many queries, whose scores are not kept then."""
    suits = dtype.itemsize == 2 and query[3] % 8 == 0 and query[1] >= 256
    return suits and query[3] <= min(cudnn_channels(getattr(d, "compute_capability", "")) for d in jax.devices())


def cudnn_channels(capability: str) -> int:
    """The most channels of a head for cuDNN's flash attention on a GPU; 0: there is none, as on AMD's."""
    # NVIDIA's say "8.6", AMD's "gfx90a". The gradient of wide heads is Hopper's alone.
    major = capability.split(".")[0]
    if not major.isdecimal() or int(major) < 8:
        return 0
    return 256 if int(major) == 9 else 128


def fits_splash(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Positions must fill whole blocks. The bound of 1024 is not measured; maxdiffusion's is 4096."""
    # Without the mesh of a training step `on_each_device` cannot split the kernel over the chips that hold the weights.
    if jax.sharding.get_abstract_mesh().empty and jax.local_device_count() > 1:
        return False
    return min(query[1], key[1]) >= 1024 and query[1] % BLOCK == 0 == key[1] % BLOCK


def always(*_) -> bool:
    return True


XLA = Kernel(jax.nn.dot_product_attention, always)
KERNELS = {
    "cpu": (Kernel(heads_first, always),),
    "gpu": (Kernel(cudnn, fits_cudnn), XLA),
    "tpu": (Kernel(splash, fits_splash), XLA),
}
"""backend -> kernels in order of preference; the last one suits everything."""


def choose(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> Kernel:
    """Returns the kernel for these shapes on this backend."""
    kernels = KERNELS.get(jax.default_backend(), (XLA,))
    return next(kernel for kernel in kernels if kernel.suits(query, key, dtype))


def dot_product_attention(
    query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"], value: Float[Array, "B K H D"]
) -> Float[Array, "B Q H D"]:
    """Softmax attention, with logits and softmax in float32."""
    return choose(query.shape, key.shape, query.dtype).run(query, key, value)


def probabilities(query: Float[Array, "B Q H D"], key: Float[Array, "B K H D"]) -> Float[Array, "B Q K"]:
    """The attention probabilities, averaged over heads, in float32: for inspection, not for training or sampling."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits).mean(1)
