"""The published models' sizes, from their configs alone."""

import jax
import jax.numpy as jnp
import pytest

from catversion_jax.base import pipeline
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.unet import UNet2DConditionModel, UNetConfig
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.utils import tree
from tests import tiny

SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21_UNET = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SD21_TEXT = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)


@pytest.mark.parametrize(
    ("name", "module", "count"),
    [
        ("unet", UNet2DConditionModel(UNetConfig.from_json(SD15_UNET)), 859_520_964),
        ("unet", UNet2DConditionModel(UNetConfig.from_json(SD21_UNET)), 865_910_724),
        ("vae", AutoencoderKL(VAEConfig()), 83_653_863),
        ("text", CLIPTextModel(CLIPTextConfig()), 123_060_480),
        ("text", CLIPTextModel(SD21_TEXT), 340_387_840),
    ],
    ids=["sd15-unet", "sd21-unet", "vae", "sd15-text", "sd21-text"],
)
def test_parameter_counts(name, module, count):
    assert tree.count_numbers(pipeline.abstract(name, module)) == count


def test_mini_unet(mini):
    assert tree.count_numbers(mini.params["unet"]) == 13_374_052


def test_dtype_is_that_of_the_computation(tiny_model):
    pipe = tiny.load(tiny_model, dtype="bfloat16")
    params = {"params": pipe.params["unet"]}
    x = jnp.zeros((1, *pipe.networks.latent_shape))
    out = jax.eval_shape(pipe.networks.unet.apply, params, x, jnp.zeros(1, jnp.int32), jnp.zeros((1, 77, 32)))
    assert out.dtype == jnp.bfloat16
    assert pipe.params["vae"]["quant_conv"]["kernel"].dtype == jnp.float32
