"""The noise-prediction loss on held-out photos, at the same noise and timesteps for every concept and setting."""

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.models.unet import Context
from catversion_jax.training.state import Frozen
from catversion_jax.training.step import Minibatch, batch_errors
from catversion_jax.utils.padded_batches import in_batches
from catversion_jax.utils.types import Float

TIMESTEPS = 8  # evenly spaced


def heldout_loss(pipeline: Pipeline, latents: Float[np.ndarray, "N h w c"], context: Context) -> float:
    """Returns the loss on latents at fixed timesteps and noise, conditioned on one prompt."""
    networks, params = pipeline.networks, pipeline.params
    frozen = Frozen(params["unet"], params["text"], jnp.asarray(networks.schedule.alphas_cumprod))
    total = networks.schedule.num_train_timesteps
    spaced = ((np.arange(TIMESTEPS) + 0.5) * total / TIMESTEPS).astype(np.int32)
    repeated = np.repeat(latents, TIMESTEPS, axis=0)
    noise = np.random.default_rng(0).standard_normal(repeated.shape).astype(np.float32)
    timesteps = np.tile(spaced, len(latents))

    def errors(latents, noise, timesteps) -> Float[np.ndarray, "B"]:
        batch = Minibatch(latents, noise, timesteps, prompts=())
        same = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(latents), *x.shape[1:])), context)
        return batch_errors(frozen, batch, same, networks=networks)

    return float(in_batches(errors, repeated, noise, timesteps).mean())
