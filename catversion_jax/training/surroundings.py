"""What surrounds the subject of each photo, told by the base model itself.

A training prompt that says where the subject is ("a photo of a teapot in the snow") leaves less of the photo for the
concept to explain, so it learns less of the background. The phrase is chosen as a diffusion model classifies: the one
by which it predicts the noise in the photo best (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot
Classifier").
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.sampling.conditioning import context
from catversion_jax.training.state import Frozen
from catversion_jax.training.step import Minibatch, batch_errors
from catversion_jax.utils.padded_batches import in_batches
from catversion_jax.utils.types import Float

SHARES = (0.65, 0.8, 0.95)
"""Timesteps at which the phrases are compared, as shares of the noise schedule: with less noise, the photo itself tells
the model what surrounds the subject, and the phrase makes no difference."""


def find_surroundings(
    pipeline: Pipeline, prompt: str, phrases: Sequence[str], latents: Float[np.ndarray, "N h w c"]
) -> list[str]:
    """Returns, for each photo, the phrase that describes it best after the prompt; the first of equals."""
    networks, params = pipeline.networks, pipeline.params
    frozen = Frozen(params["unet"], params["text"], jnp.asarray(networks.schedule.alphas_cumprod))
    timesteps = (np.array(SHARES) * networks.schedule.num_train_timesteps).astype(np.int32)
    # All phrases see the same noise, so that their errors differ by what they say.
    noise = np.random.default_rng(0).standard_normal((len(SHARES), *latents.shape[1:])).astype(np.float32)
    said = context(pipeline, [f"{prompt} {phrase}" for phrase in phrases])
    shape = (len(latents), len(phrases), len(SHARES))

    def errors(photo, phrase, time) -> Float[np.ndarray, "B"]:
        batch = Minibatch(latents[photo], noise[time], timesteps[time], prompts=())
        return batch_errors(frozen, batch, jax.tree.map(lambda x: x[phrase], said), networks=networks)

    each = in_batches(errors, *(index.ravel() for index in np.indices(shape))).reshape(shape)
    return [phrases[best] for best in each.mean(2).argmin(1)]
