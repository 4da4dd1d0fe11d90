"""Where an image shows the concept: from the UNet's own cross-attention to the class word, without another model."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from catversion_jax.base.noise_schedule import add_noise
from catversion_jax.base.pipeline import Networks, Pipeline
from catversion_jax.base.tokenizer import find_word
from catversion_jax.data.latents import posteriors
from catversion_jax.models.unet import Context
from catversion_jax.sampling import conditioning
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.padded_batches import padded_batches
from catversion_jax.utils.types import Array, Bool, Float, Int, Params, UInt8

FILL = (122, 116, 104)
"""The colour of what a mask removes: CLIP's mean, so that the encoder sees zeros there."""

TIMESTEPS = (0.05, 0.15, 0.25)
"""Shares of the noise schedule: early ones, where the image is there already and attention is sharp."""

BINS = 64  # of the histogram that `otsu` splits


def fill_background(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The image with FILL where the mask is false."""
    return np.where(mask[..., None], image, np.uint8(FILL))


def iou(a: Bool[np.ndarray, "h w"], b: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union; 1 where both are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def otsu(values: Float[np.ndarray, "h w"]) -> float:
    """The threshold that parts the values into the two groups farthest apart (Otsu 1979)."""
    counts, edges = np.histogram(values, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sum_below = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above, sum_above = counts.sum() - below, (counts * centres).sum() - sum_below
    means = sum_below / np.maximum(below, 1), sum_above / np.maximum(above, 1)  # empty only where all values are equal
    return float(edges[1:-1][np.argmax(below * above * (means[0] - means[1]) ** 2)])


@partial(jax.jit, static_argnames=("networks",))
def word_attention(
    unet: Params,
    latents: Float[Array, "B h w c"],
    noise: Float[Array, "h w c"],
    timestep: Int[Array, ""],
    context: Context,
    of_word: Float[Array, "B K"],
    *,
    networks: Networks,
) -> Float[Array, "B H W"]:
    """What each position of an image gives to the word's tokens: each cross-attention's map, scaled to at most 1 and to
    the image's size, summed. The middle block, whose map is the coarsest, is left out."""
    alpha = jnp.asarray(networks.schedule.alphas_cumprod)[timestep]
    noisy = add_noise(latents, jnp.broadcast_to(noise, latents.shape), jnp.full(len(latents), alpha))
    timesteps = jnp.full(len(latents), timestep)
    _, sown = networks.unet.apply({"params": unet}, noisy, timesteps, *context, mutable="intermediates")
    size = (len(latents), networks.resolution, networks.resolution)
    total = jnp.zeros(size)
    for path, (probabilities,) in flatten_dict(sown["intermediates"]).items():
        if "attn2" in path and path[0] != "mid_block":
            side = math.isqrt(probabilities.shape[1])
            seen = jnp.einsum("bqk,bk->bq", probabilities, of_word).reshape(-1, side, side)
            total += jax.image.resize(seen / seen.max((1, 2), keepdims=True), size, "cubic")
    return total


def attention_masks(
    pipeline: Pipeline,
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    class_word: str,
) -> Bool[np.ndarray, "N H W"]:
    """A mask of each image, of the pipeline's size: its latents are noised, always with the same noise, and denoised
    a step on its prompt, and `word_attention` is parted by `otsu`. A mask depends on its image and prompt alone, and
    on no learned concept: who is judged does not choose what is looked at.

    Raises UserError for a prompt that does not hold the class word.
    """
    token_ids, word = pipeline.tokenizer(list(prompts)), pipeline.tokenizer.word(class_word)
    last = find_word(token_ids, word)[:, None]
    if (last < 0).any():
        prompt = prompts[int(np.argmin(last))]
        raise UserError(f"{prompt!r}: no class word {class_word!r} to see where it is; expected it in every prompt")
    positions = np.arange(token_ids.shape[1])
    of_word = ((positions > last - len(word)) & (positions <= last)) / np.float32(len(word))
    networks = pipeline.networks
    latents = posteriors(networks.vae, pipeline.params["vae"], images, flip=False)[0][:, 0]
    noises = np.random.default_rng(0).standard_normal((len(TIMESTEPS), *networks.latent_shape)).astype(np.float32)
    maps = []
    for index in padded_batches(len(images)):
        context = conditioning.condition(pipeline, [prompts[i] for i in index])
        see = partial(word_attention, pipeline.params["unet"], latents[index], networks=networks)
        steps = [int(share * networks.schedule.num_train_timesteps) for share in TIMESTEPS]
        seen = [see(noise, step, context, of_word[index]) for noise, step in zip(noises, steps, strict=True)]
        maps.append(np.sum(jax.device_get(seen), axis=0))
    return np.stack([seen > otsu(seen) for seen in np.concatenate(maps)[: len(images)]])
