"""The image autoencoder of Stable Diffusion (diffusers' AutoencoderKL), NHWC, images in [-1, 1]."""

from dataclasses import dataclass
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
from msgspec import Meta

from catversion_jax.models.attention import dot_product_attention
from catversion_jax.models.convolution import Conv3x3
from catversion_jax.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from catversion_jax.models.parametrized import Conv, Dense
from catversion_jax.utils.json_config import Depth, Positive, Width, from_json, not_in_file, require
from catversion_jax.utils.types import Array, Float

NORM_EPS = 1e-6
FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


@dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' AutoencoderKL config that shape the network."""

    in_channels: Width = 3
    out_channels: Width = 3
    block_out_channels: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=8)] = (128, 256, 512, 512)
    layers_per_block: Depth = 2
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    scaling_factor: Positive = 0.18215  # latents = scaling_factor x a sample of the posterior
    dtype: Any = not_in_file(jnp.float32)

    def __post_init__(self):
        require(
            all(channels % self.norm_num_groups == 0 for channels in self.block_out_channels),
            f"norm_num_groups={self.norm_num_groups} does not divide block_out_channels={self.block_out_channels}",
        )

    @classmethod
    def from_json(cls, json: dict, **overrides) -> "VAEConfig":
        return from_json(cls, json, FIXED, **overrides)

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


def vae_resnet(config: VAEConfig, channels: int, j: int) -> ResnetBlock2D:
    return ResnetBlock2D(channels, config.norm_num_groups, NORM_EPS, config.dtype, name=f"resnets_{j}")


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        b, h, w, c = x.shape
        y = nn.GroupNorm(self.config.norm_num_groups, epsilon=NORM_EPS, dtype=self.config.dtype, name="group_norm")(x)
        y = y.reshape(b, h * w, 1, c)
        query, key, value = (Dense(c, dtype=self.config.dtype, name=name)(y) for name in ("query", "key", "value"))
        y = dot_product_attention(query, key, value).reshape(b, h, w, c)
        return x + Dense(c, dtype=self.config.dtype, name="proj_attn")(y)


class VAEMidBlock(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        x = vae_resnet(self.config, x.shape[-1], 0)(x)
        x = AttentionBlock(self.config, name="attentions_0")(x)
        return vae_resnet(self.config, x.shape[-1], 1)(x)


PIXELS = "B h*{self.config.downscale} w*{self.config.downscale} {self.config.out_channels}"
LATENTS = "B h//{self.config.downscale} w//{self.config.downscale} {self.config.latent_channels}"
MOMENTS = "B h//{self.config.downscale} w//{self.config.downscale} {2*self.config.latent_channels}"
"""The shapes of decoded latents [B, h, w, c] (PIXELS) and of encoded images [B, h, w, 3] (the other two)."""


class DownEncoderBlock(nn.Module):
    config: VAEConfig
    channels: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ {self.channels}"]:
        for j in range(self.config.layers_per_block):
            x = vae_resnet(self.config, self.channels, j)(x)
        if self.downsample:  # padded on the right and at the bottom only, as CompVis' Downsample
            x = Downsample2D(self.channels, ((0, 1), (0, 1)), self.config.dtype, name="downsamplers_0")(x)
        return x


class UpDecoderBlock(nn.Module):
    config: VAEConfig
    channels: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ {self.channels}"]:
        for j in range(self.config.layers_per_block + 1):
            x = vae_resnet(self.config, self.channels, j)(x)
        return Upsample2D(self.channels, self.config.dtype, name="upsamplers_0")(x) if self.upsample else x


class Encoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w 3"]) -> Float[Array, MOMENTS]:
        cfg = self.config
        x = Conv3x3(cfg.block_out_channels[0], cfg.dtype, name="conv_in")(x)
        for i, channels in enumerate(cfg.block_out_channels):
            x = DownEncoderBlock(cfg, channels, i < len(cfg.block_out_channels) - 1, name=f"down_blocks_{i}")(x)
        x = VAEMidBlock(cfg, name="mid_block")(x)
        x = nn.silu(nn.GroupNorm(cfg.norm_num_groups, epsilon=NORM_EPS, dtype=cfg.dtype, name="conv_norm_out")(x))
        return Conv3x3(2 * cfg.latent_channels, cfg.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, PIXELS]:
        cfg = self.config
        x = Conv3x3(cfg.block_out_channels[-1], cfg.dtype, name="conv_in")(x)
        x = VAEMidBlock(cfg, name="mid_block")(x)
        for i, channels in enumerate(reversed(cfg.block_out_channels)):
            x = UpDecoderBlock(cfg, channels, i < len(cfg.block_out_channels) - 1, name=f"up_blocks_{i}")(x)
        x = nn.silu(nn.GroupNorm(cfg.norm_num_groups, epsilon=NORM_EPS, dtype=cfg.dtype, name="conv_norm_out")(x))
        return Conv3x3(cfg.out_channels, cfg.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    config: VAEConfig

    def setup(self):
        cfg = self.config
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = Conv(2 * cfg.latent_channels, (1, 1), dtype=cfg.dtype)
        self.post_quant_conv = Conv(cfg.latent_channels, (1, 1), dtype=cfg.dtype)

    def encode(self, images: Float[Array, "B h w 3"]) -> tuple[Float[Array, LATENTS], Float[Array, LATENTS]]:
        """Returns the posterior's mean and log-variance, float32, not yet scaled by `scaling_factor`."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, PIXELS]:
        """Returns the images of latents that are not scaled by `scaling_factor`."""
        return self.decoder(self.post_quant_conv(latents))

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
        """Encodes images and decodes the posterior's mean; only `init` traces it."""
        return self.decode(self.encode(images)[0])
