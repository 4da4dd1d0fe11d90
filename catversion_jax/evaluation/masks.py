"""Masks of the subject from the UNet's own cross-attention to the class word, without another model."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.noise_schedule import add_noise
from catversion_jax.base.pipeline import BasePipeline, Networks
from catversion_jax.base.words import token_weights
from catversion_jax.data.latents import posteriors
from catversion_jax.models.unet import Context
from catversion_jax.sampling import conditioning
from catversion_jax.sampling.regions import attention_to_words
from catversion_jax.utils.compiler import jit
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.padded_batches import padded_batches
from catversion_jax.utils.types import AnyArray, Array, Bool, Float, Int, Params, UInt8

FILL = (122, 116, 104)
"""Colour that fills what a mask removes: CLIP's mean, so that the encoder sees zeros there."""

TIMESTEPS = (0.05, 0.15, 0.25)
"""Shares of the noise schedule: small ones, at which the image is still visible and attention is sharp."""

BINS = 64  # of the histogram that `otsu` splits


def fill_background(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image with FILL where the mask is false."""
    return np.where(mask[..., None], image, np.asarray(FILL, np.uint8))


def iou(a: Bool[np.ndarray, "h w"], b: Bool[np.ndarray, "h w"]) -> float:
    """Returns the intersection over union; 1 if both masks are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def otsu(values: Float[np.ndarray, "h w"]) -> float:
    """Returns the threshold that splits the values into the two groups farthest apart (Otsu 1979)."""
    counts, edges = np.histogram(values, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sum_below = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above, sum_above = counts.sum() - below, (counts * centres).sum() - sum_below
    # A group is empty only if all values are equal; its mean does not matter then.
    means = sum_below / np.maximum(below, 1), sum_above / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * (means[0] - means[1]) ** 2)])


class Searched(NamedTuple):
    """Images, and the word whose region is looked for in each."""

    latents: Float[Array, "B h w c"]
    context: Context  # of each image's prompt
    of_word: Float[AnyArray, "B K"]  # weights of the word's tokens in each prompt, which sum to 1


@partial(jit, static_argnames=("networks",))
def word_attention(
    unet: Params,
    searched: Searched,
    noise: Float[Array, "h w c"],
    timestep: Int[Array, ""],
    *,
    networks: Networks,
) -> Float[Array, "B H W"]:
    """Returns each position's attention to the word's tokens, at the image's size."""
    latents, context, of_word = searched
    alpha = jnp.asarray(networks.schedule.alphas_cumprod)[timestep]
    noisy = add_noise(latents, jnp.broadcast_to(noise, latents.shape), jnp.full(len(latents), alpha))
    timesteps = jnp.full(len(latents), timestep)
    _, sown = networks.unet.apply({"params": unet}, noisy, timesteps, *context, mutable="intermediates")
    _, height, width, _ = latents.shape
    scale = networks.vae.config.downscale
    (attention,) = attention_to_words(sown["intermediates"], of_word[None], (height, width), scale)
    return attention


def attention_masks(
    pipeline: BasePipeline,
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    class_word: str,
) -> Bool[np.ndarray, "N H W"]:
    """Returns a mask of the class word's region in each image, of the pipeline's size.

    The image's latents are noised and denoised one step on its prompt, and `otsu` splits the `word_attention` of that
    step. A mask depends on its image and prompt alone.

    Raises UserError for a prompt that does not contain the class word.
    """
    (of_word,) = token_weights(pipeline.tokenizer, pipeline.tokenizer(list(prompts)), [class_word])
    if not of_word.any(1).all():
        prompt = prompts[int(of_word.any(1).argmin())]
        raise UserError(f"{prompt!r}: no class word {class_word!r} to see where it is; expected it in every prompt")
    networks = pipeline.networks
    # The same noise for all images: a mask does not depend on how many there are, nor on their order.
    noises = np.random.default_rng(0).standard_normal((len(TIMESTEPS), *networks.latent_shape)).astype(np.float32)
    found: list[np.ndarray] = []
    for index in padded_batches(len(images)):
        # On the base model's text states: the evaluated concept cannot influence its own masks.
        context = conditioning.condition(pipeline, [prompts[i] for i in index])
        latents = posteriors(networks.vae, pipeline.params["vae"], images[index], flip=False)[0][:, 0]
        searched = Searched(jnp.asarray(latents), context, of_word[index])
        see = partial(word_attention, pipeline.params["unet"], searched, networks=networks)
        steps = [int(share * networks.schedule.num_train_timesteps) for share in TIMESTEPS]
        seen = [see(noise, step) for noise, step in zip(noises, steps, strict=True)]
        found += [whole > otsu(whole) for whole in np.sum(jax.device_get(seen), axis=0)]
    return np.stack(found[: len(images)])
