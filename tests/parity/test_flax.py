"""Our modules on the same parameter trees as the last Flax classes of diffusers (0.39) and transformers (4.57).

The reference differs from PyTorch, which we follow, in two places: its GEGLU uses the tanh approximation of GELU, and
its transformer's group norm has epsilon 1e-5 instead of 1e-6. With the first undone here, trees and numbers agree.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
from flax.traverse_util import flatten_dict
from transformers import CLIPTextConfig as ReferenceTextConfig
from transformers import FlaxCLIPTextModel

from catversion_jax.base import pipeline
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.unet import UNet2DConditionModel, UNetConfig
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.utils.json_config import from_json
from tests.tiny import random_params

SD15_UNET = {
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "sample_size": 16,
}
SD21_UNET = SD15_UNET | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
VAE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
SD15_TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
}
SD21_TEXT = SD15_TEXT | {"num_hidden_layers": 23, "hidden_act": "gelu"}


def same_tree(ours, theirs):
    shapes = [{path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()} for tree in (ours, theirs)]
    assert shapes[0] == shapes[1]


def close(actual, expected, tolerance):
    error = float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())
    print(f"relative max error {error:.1e}")
    assert error < tolerance


@pytest.mark.parametrize("config", [SD15_UNET, SD21_UNET], ids=["sd15", "sd21"])
def test_unet(config, monkeypatch):
    reference = FlaxUNet2DConditionModel(**config)
    ours = UNet2DConditionModel(UNetConfig.from_json(config))
    shapes = pipeline.abstract("unet", ours)
    same_tree(shapes, jax.eval_shape(lambda: reference.init_weights(jax.random.key(0))))
    rng = np.random.default_rng(0)
    params = {"params": random_params(shapes, rng)}
    latents, context = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 16, 16, 4), (2, 77, 48)))
    timesteps = jnp.asarray([3, 801])
    actual = jax.jit(ours.apply)(params, latents, timesteps, context)

    def theirs():
        out = jax.jit(reference.apply)(params, jnp.moveaxis(latents, -1, 1), timesteps, context)
        return jnp.moveaxis(out.sample, 1, -1)

    close(actual, theirs(), 2e-2)  # as released, with tanh-GELU
    exact = nn.gelu
    monkeypatch.setattr(nn, "gelu", lambda x, approximate=False: exact(x, approximate=False))
    close(actual, theirs(), 1e-4)


def test_vae():
    reference = FlaxAutoencoderKL(**VAE)
    ours = AutoencoderKL(VAEConfig.from_json(VAE))
    shapes = pipeline.abstract("vae", ours)
    same_tree(shapes, jax.eval_shape(lambda: reference.init_weights(jax.random.key(0))))
    rng = np.random.default_rng(0)
    params = {"params": random_params(shapes, rng)}
    images = jnp.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    posterior = reference.apply(params, jnp.moveaxis(images, -1, 1), method=reference.encode).latent_dist
    mean, logvar = ours.apply(params, images, method="encode")
    close(mean, posterior.mean, 1e-4)
    close(logvar, posterior.logvar, 1e-4)
    theirs = reference.apply(params, jnp.moveaxis(mean, -1, 1), method=reference.decode).sample
    close(ours.apply(params, mean, method="decode"), jnp.moveaxis(theirs, 1, -1), 1e-4)


@pytest.mark.parametrize("config", [SD15_TEXT, SD21_TEXT], ids=["sd15", "sd21"])
def test_text_encoder(config):
    reference = FlaxCLIPTextModel(ReferenceTextConfig(**config, eos_token_id=2), _do_init=False)
    ours = CLIPTextModel(from_json(CLIPTextConfig, config, {}))
    shapes = pipeline.abstract("text", ours)
    same_tree(shapes, jax.eval_shape(lambda: reference.init_weights(jax.random.key(0), (1, 77))))
    rng = np.random.default_rng(0)
    params = random_params(shapes, rng)
    token_ids = jnp.asarray(rng.integers(0, 100, (2, 77)))
    theirs = reference(token_ids, params=params, output_hidden_states=True)
    actual = jax.jit(ours.apply)({"params": params}, token_ids)
    close(actual["last_hidden_state"], theirs.last_hidden_state, 1e-4)
    for mine, other in zip(actual["hidden_states"], theirs.hidden_states, strict=True):
        close(mine, other, 1e-4)
