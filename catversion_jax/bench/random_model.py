"""Stable Diffusion 1.x with random weights: as fast as with the published ones, for machines that lack these."""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.base.pipeline import COMPONENTS, DTYPES, BasePipeline, Networks, abstract
from catversion_jax.utils.types import Array, Float, Key, Params
from catversion_jax.weights import ldm

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"

RANDOM = {
    "text": {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "unet": {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "sample_size": 64,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
}
"""Component -> config.json of Stable Diffusion 1.x."""

RANDOM_FOR = (SD15, "CompVis/stable-diffusion-v1-4")
"""Models that random weights stand in for if they are not on the disk."""


def random_model(dtype: str) -> BasePipeline:
    """Returns Stable Diffusion 1.x with random weights, made on the device.

    It has neither the VAE's parameters nor a tokenizer, which the step does not need.
    """
    networks, dtype = random_networks(dtype), DTYPES[dtype]
    params = {
        "text": (random_params(abstract("text", networks.text[0]), dtype),),
        "unet": random_params(abstract("unet", networks.unet), dtype),
    }
    return BasePipeline(networks, params, tokenizers=(), fingerprint="")


def random_networks(dtype: str, configs: Mapping[str, dict[str, Any]] = RANDOM) -> Networks:
    """Returns Stable Diffusion 1.x's networks, or others by their config.json."""
    # As a model that is loaded: its VAE's weights are float32.
    dtypes = dict.fromkeys(configs, DTYPES[dtype]) | {"vae": jnp.float32}
    text_encoder, unet, vae = (COMPONENTS[name].make(of_part, dtypes[name]) for name, of_part in configs.items())
    return Networks((text_encoder,), unet, vae, NoiseSchedule.from_json(ldm.FAMILIES[0].scheduler))


def random_params(shapes: Params, dtype: Any) -> Params:
    """Returns random weights that keep the activations' scale, on the default device."""
    # One at a time, so that making them takes no more memory than they do.
    key = jax.random.key(0, impl="rbg")
    count = itertools.count()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: random_param(jax.random.fold_in(key, next(count)), path[-1].key, leaf.shape, dtype), shapes
    )


@partial(jax.jit, static_argnames=("name", "shape", "dtype"))
def random_param(key: Key[Array, ""], name: str, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    fixed = {"scale": jnp.ones, "bias": jnp.zeros}
    if name in fixed:
        return fixed[name](shape, dtype)
    limit = math.sqrt(3 / math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -limit, limit)
