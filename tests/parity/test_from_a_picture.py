"""Image to image and inpainting against diffusers' pipelines, on a narrowed Stable Diffusion 1.5."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.sampling.denoising import initial_latents
from catversion_jax.sampling.picture_input import PictureInput
from catversion_jax.sampling.sampler import SampleRequest, sample_images
from tests import tiny
from tests.parity.test_pipelines import sd15

SIDE = 16  # of the latents, two pixels each
PROMPT, STEPS, SEED = "a photo of a teapot", 6, 3


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    torch.manual_seed(0)
    theirs = sd15()
    for part in (theirs.unet, theirs.vae, theirs.text_encoder):
        for weights in part.parameters():
            torch.nn.init.normal_(weights, mean=float(weights.ndim == 1), std=0.05)
    folder = tmp_path_factory.mktemp("pipeline")
    theirs.save_pretrained(folder)
    return theirs, tiny.load(folder)


@pytest.mark.parametrize("denoise", [0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
def test_pictures(both, monkeypatch, masked, denoise):
    theirs, ours = both
    unit = ours.networks.vae.config.downscale
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (SIDE * unit, SIDE * unit, 3), np.uint8)
    mask = np.zeros(pixels.shape[:2], bool)
    mask[4 * unit : 10 * unit, 2 * unit : 12 * unit] = True
    noise = np.asarray(initial_latents(jnp.uint32([SEED]), (SIDE, SIDE, 4)))
    ours_noise = torch.from_numpy(noise).permute(0, 3, 1, 2)
    for kind in ("img2img", "inpaint"):
        module = f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{kind}.randn_tensor"
        monkeypatch.setattr(module, lambda *_, **__: ours_noise)
    # Theirs draws from the posterior, ours takes its mean.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    kind = StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline
    parts = dict(theirs.components) | {"scheduler": DDIMScheduler.from_config(theirs.scheduler.config)}
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = {"mask_image": Image.fromarray(mask)} if masked else {}
    size = {"height": len(pixels), "width": len(pixels)} if masked else {}
    expected = pipe(
        PROMPT, image=Image.fromarray(pixels), strength=denoise, num_inference_steps=STEPS, guidance_scale=4.0,
        output_type="np", **given, **size,
    ).images[0]  # fmt: skip

    start = PictureInput(pixels, mask if masked else None, denoise)
    request = SampleRequest((PROMPT,), (SEED,), SamplerConfig(STEPS, 4.0, 1, "ddim"), start=start)
    (image,) = sample_images(ours, request)
    inside = mask if masked else np.ones_like(mask)
    difference = np.abs(image.astype(np.float32) / 255 - expected)[inside]
    print(f"most {difference.max():.4f}")
    assert difference.max() < 2.5 / 255
