"""What training carries (what is learned) and what it reads (one concept's photos and prompts).

Every leaf has a leading concept axis C, of size 1 for a solo run, so that concepts can be stacked.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from catversion_jax.base.pipeline import Networks, Pipeline
from catversion_jax.base.text_states import PromptStates
from catversion_jax.methods.base import Method
from catversion_jax.models.sharding import Rules, param_shardings, sharding
from catversion_jax.utils.types import Array, Float, Int, Params, UInt32


class TrainState(flax.struct.PyTreeNode):
    step: Int[Array, "C"]  # updates done
    seed: UInt32[Array, "C"]  # the base key of all randomness; step t draws from fold_in(key(seed), t)
    learned: Params  # by the method: for CatVersion, a prefix [C, P, L, 2, H, D] for each text encoder
    opt_state: optax.OptState
    best: Float[Array, "C"]  # the lowest evaluation loss so far
    stale: Int[Array, "C"]  # evaluations since then


class ConceptData(flax.struct.PyTreeNode):
    """Photos and prompts, padded to buckets so that folders of different sizes share one compiled step."""

    mean: Float[Array, "C N F h w c"]  # posterior of each photo, F = 2 with its mirror image, else 1
    std: Float[Array, "C N F h w c"]
    photos: Int[Array, "C"]  # how many of the N are real
    prompts: tuple[PromptStates, ...]  # [C, T, ...] for each text encoder
    prompt_count: Int[Array, "C"]  # how many of the T are real
    steps: Int[Array, "C"]  # the length of each concept's learning rate schedule
    weight: Float[Array, "C N F h w 1"] | None = None  # of each latent position in the loss; None: all alike
    prior: "ConceptData | None" = None  # the base model's own images of the class, where the method learns from them


class Frozen(flax.struct.PyTreeNode):
    """The base model's share in the step: never differentiated, never donated."""

    unet: Params
    text: tuple[Params, ...]
    alphas_cumprod: Float[Array, "timesteps"]

    @classmethod
    def of(cls, pipeline: Pipeline, mesh: Mesh, rules: Rules) -> "Frozen":
        """The pipeline's parameters on a step's mesh: moved only if they do not lie so already."""

        def put(params: Params) -> Params:
            return jax.device_put(params, param_shardings(params, mesh, rules))

        alphas = jax.device_put(pipeline.networks.schedule.alphas_cumprod, sharding(mesh, "frozen"))
        return cls(put(pipeline.params["unet"]), tuple(map(put, pipeline.params["text"])), alphas)


def init_state(
    seeds: Sequence[int], method: Method, networks: Networks, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state for each seed; what is random in it is drawn from a stream that no step draws from."""

    def one(seed: UInt32[Array, ""]) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), jnp.uint32(2**32 - 1))
        learned = method.init(key, networks)
        return TrainState(jnp.int32(0), seed, learned, optimizer.init(learned), jnp.float32(jnp.inf), jnp.int32(0))

    return jax.jit(jax.vmap(one))(jnp.asarray(seeds, jnp.uint32))
