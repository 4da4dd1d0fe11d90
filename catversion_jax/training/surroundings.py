"""What surrounds the subject of each photo, told by the base model itself.

A training prompt that says where the subject is ("a photo of a teapot in the snow") leaves less of the photo for the
concept to explain, so it learns less of the background. The phrase is chosen as a diffusion model classifies: the one
by which it predicts the noise in the photo best (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot
Classifier").
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.data.photos import Photo
from catversion_jax.sampling.conditioning import context
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.state import Frozen
from catversion_jax.training.step import Minibatch, batch_errors
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.padded_batches import in_batches
from catversion_jax.utils.records import encode, read_record
from catversion_jax.utils.types import Float, Int

SHARES = (0.65, 0.8, 0.95)
"""Timesteps at which the phrases are compared, as shares of the noise schedule: with less noise, the photo itself tells
the model what surrounds the subject, and the phrase makes no difference."""


def surroundings_of(
    photos: Sequence[Photo],
    latents: Float[np.ndarray, "N h w c"],
    pipeline: Pipeline,
    prompt: str,
    phrases: Sequence[str],
    run: RunDir | None,
) -> list[str]:
    """Returns the phrase of each photo. A run keeps them, so that it goes on with the same ones wherever it is resumed.

    Raises UserError if the run's file is damaged.
    """
    if run is None:
        return list(find_surroundings(pipeline, prompt, phrases, latents))
    if run.has_saved_steps and run.surroundings.is_file():
        told = read_record(run.surroundings, dict[str, str], "expected the phrase of each photo; remove the file")
        if told.keys() == {photo.name for photo in photos} and set(told.values()) <= set(phrases):
            return [told[photo.name] for photo in photos]
    each = find_surroundings(pipeline, prompt, phrases, latents)
    found = list(tqdm(each, total=len(photos), unit=" photos", desc="surroundings", leave=False))
    text = encode({photo.name: phrase for photo, phrase in zip(photos, found, strict=True)})
    write_atomically(run.surroundings, lambda path: path.write_text(text))
    return found


def find_surroundings(
    pipeline: Pipeline, prompt: str, phrases: Sequence[str], latents: Float[np.ndarray, "N h w c"]
) -> Iterator[str]:
    """Yields, for each photo, the phrase that describes it best after the prompt; the first of equals."""
    networks, params = pipeline.networks, pipeline.params
    frozen = Frozen(params["unet"], params["text"], jnp.asarray(networks.schedule.alphas_cumprod))
    timesteps = (np.array(SHARES) * networks.schedule.num_train_timesteps).astype(np.int32)
    # All phrases see the same noise, so that their errors differ by what they say.
    noise = np.random.default_rng(0).standard_normal((len(SHARES), *latents.shape[1:])).astype(np.float32)
    said = context(pipeline, [f"{prompt} {phrase}" for phrase in phrases])
    shape = (len(phrases), len(SHARES))
    for photo in latents:

        def errors(phrase: Int[np.ndarray, "B"], time: Int[np.ndarray, "B"], photo=photo) -> Float[np.ndarray, "B"]:
            batch = Minibatch(np.stack([photo] * len(time)), noise[time], timesteps[time], prompts=())
            return batch_errors(frozen, batch, jax.tree.map(lambda x: x[phrase], said), networks=networks)

        each = in_batches(errors, *(index.ravel() for index in np.indices(shape))).reshape(shape)
        yield phrases[each.mean(1).argmin()]
