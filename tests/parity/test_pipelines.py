"""Whole pipelines written by diffusers (PyTorch) at narrowed width: read, and conditioned and denoised alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from catversion_jax.base import pipeline
from catversion_jax.sampling import conditioning
from tests import tiny

PROMPTS = ["a photo of a teapot on the beach", ""]
TEXT = {"vocab_size": 1584, "eos_token_id": 1583, "bos_token_id": 1582, "num_attention_heads": 4}
UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 3),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}


def text_model(layers: int, width: int, act: str, projection: int | None = None):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "hidden_act": act}
    config = CLIPTextConfig(**TEXT, **sizes, projection_dim=projection or 512)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def shared(unet: dict, v_prediction: bool = False) -> dict:
    """The parts that all families have; every weight random, so that no bias is zero."""
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    prediction = "v_prediction" if v_prediction else "epsilon"
    return {
        "vae": vae,
        "unet": UNet2DConditionModel(**UNET | unet),
        "tokenizer": CLIPTokenizer.from_pretrained(pipeline.MINI / "tokenizer"),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False, set_alpha_to_one=False
        ),
    }


def sd15():
    return StableDiffusionPipeline(
        text_encoder=text_model(12, 48, "quick_gelu"),
        **shared(CROSS | {"cross_attention_dim": 48, "attention_head_dim": 4}),
        safety_checker=None,
        feature_extractor=None,
    )


def sd21():
    unet = CROSS | {"cross_attention_dim": 64, "attention_head_dim": (2, 4), "use_linear_projection": True}
    return StableDiffusionPipeline(
        text_encoder=text_model(23, 64, "gelu"),
        **shared(unet, v_prediction=True),
        safety_checker=None,
        feature_extractor=None,
    )


def sdxl():
    parts = shared(XL | {"cross_attention_dim": 48 + 64})
    parts["scheduler"] = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading")
    return StableDiffusionXLPipeline(
        text_encoder=text_model(12, 48, "quick_gelu"),
        text_encoder_2=text_model(32, 64, "gelu", projection=40),
        tokenizer_2=CLIPTokenizer.from_pretrained(pipeline.MINI / "tokenizer", pad_token="!"),
        **parts,
    )


@pytest.fixture(scope="module", params=[sd15, sd21, sdxl], ids=["sd15", "sd21", "sdxl"])
def both(request, tmp_path_factory):
    """A diffusers pipeline with random weights, and ours read from what it saves."""
    torch.manual_seed(0)
    theirs = request.param()
    for part in (theirs.unet, theirs.vae, theirs.text_encoder, getattr(theirs, "text_encoder_2", None)):
        for weights in part.parameters() if part else ():
            torch.nn.init.normal_(weights, mean=float(weights.ndim == 1), std=0.05)
    folder = tmp_path_factory.mktemp("pipeline")
    theirs.save_pretrained(folder)
    return theirs, tiny.load(folder)


def close(actual, expected, tolerance=1e-4):
    expected = expected.detach().numpy()
    error = float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())
    print(f"relative max error {error:.1e}")
    assert error < tolerance


def their_states(theirs) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        out = theirs.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return (out[0], out[2]) if len(out) == 4 else (out[0], None)


def test_conditioning(both):
    theirs, ours = both
    context = conditioning.condition(ours, PROMPTS)
    states, pooled = their_states(theirs)
    close(context.states, states)
    assert (context.pooled is None) == (pooled is None)
    if pooled is not None:
        close(context.pooled, pooled)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5), (9, 8)], ids=str)
def test_unet(both, size):
    """Also at sizes that cannot be halved, and with SDXL's size conditioning for them."""
    theirs, ours = both
    states, pooled = their_states(theirs)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, *size, 4)).astype(np.float32)
    timesteps = np.asarray([7, 850])
    added = None
    if pooled is not None:
        pixels = [side * theirs.vae_scale_factor for side in size]
        time_ids = torch.tensor([[*pixels, 0, 0, *pixels]] * 2)
        added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        expected = theirs.unet(
            torch.from_numpy(latents).permute(0, 3, 1, 2),
            torch.from_numpy(timesteps),
            states,
            added_cond_kwargs=added,
        ).sample.permute(0, 2, 3, 1)
    context = [x if x is None else jnp.asarray(x.numpy()) for x in (states, pooled)]
    actual = jax.jit(ours.networks.unet.apply)({"params": ours.params["unet"]}, latents, timesteps, *context)
    close(actual, expected, 1e-3)


def test_schedule(both):
    theirs, ours = both
    schedule = ours.networks.schedule
    assert schedule.prediction_type == theirs.scheduler.config.prediction_type
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod.numpy(), rtol=1e-5)
