"""Write a random Stable Diffusion 1.5 with diffusers (float16), and what its UNet gives in PyTorch: write.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from catversion_jax.base.pipeline import MINI

BLOCKS = (128, 256, 512, 512)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        unet=UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64),
        vae=AutoencoderKL(
            block_out_channels=BLOCKS,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512,
        ),
        tokenizer=CLIPTokenizer.from_pretrained(MINI / "tokenizer"),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
    )
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    unet = pipe.unet.float()
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.normal(size=(1, 64, 64, 4)).astype(np.float32),
        "timesteps": np.asarray([500]),
        "context": rng.normal(size=(1, 77, 768)).astype(np.float32),
    }
    latents, timesteps, context = map(torch.from_numpy, inputs.values())
    with torch.no_grad():
        out = unet(latents.permute(0, 3, 1, 2), timesteps, context).sample.permute(0, 2, 3, 1)
    np.savez(folder / "unet.npz", **inputs, expected=out.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
