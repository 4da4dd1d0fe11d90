"""The training state, which a step updates, and the data, which it reads: a concept's photos and prompts.

Every leaf has a leading concept axis C, of size 1 in a run of one concept, so that concepts can be stacked.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from catversion_jax.base.pipeline import BasePipeline, Networks
from catversion_jax.base.text_states import PromptStates
from catversion_jax.config.optimizer import OptimizerConfig
from catversion_jax.config.sections import StopConfig
from catversion_jax.methods.base import Method
from catversion_jax.models.convolution import turned_kernels
from catversion_jax.models.sharding import Rules, param_shardings, sharding
from catversion_jax.utils.types import AnyArray, Array, Float, Int, Params, UInt32


class TrainState(flax.struct.PyTreeNode):
    step: Int[AnyArray, "*C"]  # updates done
    seed: UInt32[AnyArray, "*C"]  # the base key of all randomness; step t draws from fold_in(key(seed), t)
    learned: Params  # by the method: for CatVersion, a prefix [C, P, L, 2, H, D] for each text encoder
    opt_state: optax.OptState
    best: Float[AnyArray, "*C"]  # the lowest evaluation loss so far
    stale: Int[AnyArray, "*C"]  # evaluations since then
    kept: Params | None = None  # what was learned by then; None without early stopping

    def result(self, stop: StopConfig) -> Params:
        """Returns what the concepts [1, ...] of a state learned: at its best evaluation, if it stopped early."""
        stopped_early = stop.every > 0 and self.stale[0] >= stop.patience
        return self.kept if stopped_early and self.kept is not None and jnp.isfinite(self.best[0]) else self.learned


class ConceptData(flax.struct.PyTreeNode):
    """A concept's photos and prompts, padded to buckets so that folders of different sizes share one compiled step."""

    mean: Float[AnyArray, "*C N F h w c"]  # posterior of each photo, F = 2 with its mirror image, else 1
    std: Float[AnyArray, "*C N F h w c"]
    photos: Int[AnyArray, "*C"]  # how many of the N are real
    prompts: tuple[PromptStates, ...]  # [C, T, ...] for each text encoder
    first_prompt: Int[AnyArray, "*C N"]  # each photo's prompts are `prompt_count` of the T from here on
    prompt_count: Int[AnyArray, "*C N"]
    steps: Int[AnyArray, "*C"]  # the length of each concept's learning rate schedule
    weight: Float[AnyArray, "*C N F h w 1"] | None = None  # of each latent position in the loss; None: all equal
    prior: "ConceptData | None" = None  # images of the class, if the method uses them


class Frozen(flax.struct.PyTreeNode):
    """The base model's parameters in the step: never differentiated, never donated."""

    unet: Params
    text: tuple[Params, ...]
    alphas_cumprod: Float[AnyArray, "timesteps"]
    turned: Params | None = None  # the UNet's kernels as their gradient takes them; None: they are turned in each step

    @classmethod
    def of(cls, pipeline: BasePipeline, mesh: Mesh, rules: Rules, method: Method) -> "Frozen":
        """Returns the pipeline's parameters on a step's mesh; they are moved only if they are not there already."""

        def put(params: Params) -> Params:
            return jax.device_put(params, param_shardings(params, mesh, rules))

        alphas = jax.device_put(pipeline.networks.schedule.alphas_cumprod, sharding(mesh, "frozen"))
        unet = put(pipeline.params["unet"])
        # XLA's CPU convolutions would spend a tenth of a step on it; a GPU's and a TPU's take the kernels as they are.
        turned = turned_kernels(unet) if jax.default_backend() == "cpu" and not method.changes_unet else None
        return cls(unet, tuple(map(put, pipeline.params["text"])), alphas, turned)


def compile_init(method: Method, networks: Networks, optimizer: OptimizerConfig, keeps_best: bool):
    """Returns the jitted `init(seeds)`, which makes fresh states."""
    transformation = optimizer.transformation()

    def one(seed: UInt32[Array, ""]) -> TrainState:
        # Step t draws from fold_in(key(seed), t), so no step draws from this one.
        key = jax.random.fold_in(jax.random.key(seed), jnp.uint32(2**32 - 1))
        learned = method.init(key, networks)
        best, stale = jnp.float32(jnp.inf), jnp.int32(0)
        kept = jax.tree.map(jnp.zeros_like, learned) if keeps_best else None
        return TrainState(jnp.int32(0), seed, learned, transformation.init(learned), best, stale, kept)

    return jax.jit(jax.vmap(one))
