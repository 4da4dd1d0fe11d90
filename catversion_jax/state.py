"""What training carries (the learned prefix) and what it reads (one concept's photos and prompts).

Every leaf has a leading concept axis C, of size 1 for a solo run, so that concepts can be stacked.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from catversion_jax.adapter import AdapterConfig, init_prefix
from catversion_jax.types import Array, Bool, Float, Int, Params, UInt32


class TrainState(flax.struct.PyTreeNode):
    step: Int[Array, "C"]  # updates done
    seed: UInt32[Array, "C"]  # the base key of all randomness; step t draws from fold_in(key(seed), t)
    prefix: Float[Array, "C P L 2 H D"]
    opt_state: optax.OptState


class ConceptData(flax.struct.PyTreeNode):
    """Photos and prompts, padded to buckets so that folders of different sizes share one compiled step."""

    mean: Float[Array, "C N F h w c"]  # posterior of each photo, F = 2 with its mirror image, else 1
    std: Float[Array, "C N F h w c"]
    photos: Int[Array, "C"]  # how many of the N are real
    hidden: Float[Array, "C T Q c"]  # text states below the prefix (text.lower)
    visible: Bool[Array, "C T Q"]
    prompts: Int[Array, "C"]  # how many of the T are real
    steps: Int[Array, "C"]  # the length of each concept's learning rate schedule


class Frozen(flax.struct.PyTreeNode):
    """The base model's share in the step: never differentiated, never donated."""

    unet: Params
    text: Params
    alphas_cumprod: Float[Array, "timesteps"]


def init_state(
    seeds: list[int], adapter: AdapterConfig, heads: int, head_dim: int, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state for each seed; the initial prefix is drawn from a stream that no step draws from."""

    def one(seed: UInt32[Array, ""]) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), jnp.uint32(2**32 - 1))
        prefix = init_prefix(key, adapter, heads, head_dim)
        return TrainState(jnp.int32(0), seed, prefix, optimizer.init(prefix))

    return jax.jit(jax.vmap(one))(jnp.asarray(seeds, jnp.uint32))
