"""How well a concept was learned: raw cosines in CLIP's space, and the loss on photos that were held out."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from catversion_jax import pipeline as pipelines
from catversion_jax.models.unet import Context
from catversion_jax.pipeline import Networks, Pipeline
from catversion_jax.source import open_source
from catversion_jax.state import Frozen
from catversion_jax.train_step import prediction_error
from catversion_jax.types import Array, Float, Params, UInt8

CLIP_MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)
BATCH = 8  # pictures per call of the image encoder and of the UNet
LOSS_TIMESTEPS = 8  # evenly spaced


@cache
def image_encoder(model: Path):
    """A jitted encoder of pixels, and the size it takes, from a folder with `image_encoder/`."""
    module, params = pipelines.load_component(open_source(str(model)), "image")
    return jax.jit(lambda pixels: module.apply({"params": params}, pixels)), module.config.image_size


def normalize(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def in_batches(function, *arrays: np.ndarray) -> np.ndarray:
    """`function` of BATCH rows at a time, the last rows repeated to fill it up, so that one program serves all."""
    rows = len(arrays[0])
    index = np.minimum(np.arange(-(-rows // BATCH) * BATCH), rows - 1)
    parts = [function(*(array[i] for array in arrays)) for i in np.split(index, len(index) // BATCH)]
    return np.concatenate(parts)[:rows]


def embed_images(images: Sequence[UInt8[np.ndarray, "h w 3"]], model: Path) -> Float[np.ndarray, "N e"]:
    """Unit CLIP embeddings of pictures: bicubic to the encoder's size, CLIP's mean and standard deviation removed."""
    encode, size = image_encoder(model)
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    pixels = (np.stack(resized).astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    return normalize(in_batches(encode, pixels))


@partial(jax.jit, static_argnames=("networks",))
def text_embeds(params: Params, token_ids: Array, *, networks: Networks) -> Float[Array, "B e"]:
    return networks.text[0].apply({"params": params}, token_ids)["text_embeds"]


def embed_texts(prompts: list[str], pipeline: Pipeline) -> Float[np.ndarray, "N e"]:
    """Unit CLIP embeddings of prompts by the base model's own text encoder, which must have a projection."""
    encode = partial(text_embeds, pipeline.params["text"][0], networks=pipeline.networks)
    return normalize(in_batches(encode, pipeline.tokenizer(prompts)))


def clip_i(generated: Float[np.ndarray, "G e"], references: Float[np.ndarray, "R e"]) -> float:
    """Mean cosine over all pairs of generated and reference pictures."""
    return float(np.mean(generated @ references.T))


def nearest(images: Float[np.ndarray, "G e"], captions: Float[np.ndarray, "N e"]) -> np.ndarray:
    """The index of each picture's nearest caption."""
    return np.argmax(images @ captions.T, axis=1)


@partial(jax.jit, static_argnames=("networks",))
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
    return prediction_error(frozen, latents, noise, timesteps, context, networks)


def denoising_loss(pipeline: Pipeline, latents: Float[np.ndarray, "N h w c"], context: Context) -> float:
    """The noise-prediction loss on latents at fixed timesteps and noise: the same question for every context, each of
    one prompt."""
    networks, params = pipeline.networks, pipeline.params
    frozen = Frozen(params["unet"], params["text"], jnp.asarray(networks.schedule.alphas_cumprod))
    total = networks.schedule.num_train_timesteps
    spaced = ((np.arange(LOSS_TIMESTEPS) + 0.5) * total / LOSS_TIMESTEPS).astype(np.int32)
    repeated = np.repeat(latents, LOSS_TIMESTEPS, axis=0)
    noise = np.random.default_rng(0).standard_normal(repeated.shape).astype(np.float32)
    timesteps = np.tile(spaced, len(latents))
    error = partial(batch_error, frozen, context, networks=networks)
    return float(in_batches(error, repeated, noise, timesteps).mean())
