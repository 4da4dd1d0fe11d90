"""The noise-prediction loss on held-out photos, at the same noise and timesteps for every concept and setting."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import BasePipeline, Networks
from catversion_jax.models.unet import Context
from catversion_jax.training.state import Frozen
from catversion_jax.training.step import Minibatch, prediction_error
from catversion_jax.utils.compiler import jit
from catversion_jax.utils.padded_batches import in_batches
from catversion_jax.utils.types import Array, Float

TIMESTEPS = 8  # evenly spaced


@partial(jit, static_argnames=("networks",))
def batch_error(
    frozen: Frozen,
    context: Context,
    latents: Array,
    noise: Array,
    timesteps: Array,
    *,
    networks: Networks,
) -> Float[Array, "B"]:
    context = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(latents), *x.shape[1:])), context)
    batch = Minibatch(latents, noise, timesteps, prompts=())
    return prediction_error(frozen, batch, context, networks=networks)


def heldout_loss(pipeline: BasePipeline, latents: Float[np.ndarray, "N h w c"], context: Context) -> float:
    """Returns the loss on latents at fixed timesteps and noise, conditioned on one prompt."""
    networks, params = pipeline.networks, pipeline.params
    frozen = Frozen(params["unet"], params["text"], jnp.asarray(networks.schedule.alphas_cumprod))
    total = networks.schedule.num_train_timesteps
    spaced = ((np.arange(TIMESTEPS) + 0.5) * total / TIMESTEPS).astype(np.int32)
    repeated = np.repeat(latents, TIMESTEPS, axis=0)
    noise = np.random.default_rng(0).standard_normal(repeated.shape).astype(np.float32)
    timesteps = np.tile(spaced, len(latents))
    error = partial(batch_error, frozen, context, networks=networks)
    return float(in_batches(error, repeated, noise, timesteps).mean())
