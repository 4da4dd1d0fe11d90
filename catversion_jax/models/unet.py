"""The denoising UNet of Stable Diffusion 1.x and 2.x (diffusers' UNet2DConditionModel), NHWC."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from catversion_jax.models.config import from_json
from catversion_jax.models.layers import Downsample2D, ResnetBlock2D, Transformer2D, Upsample2D, conv3x3
from catversion_jax.types import Array, Float, Int

FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
"""Config keys whose other values are other networks (upscalers, SDXL, ...)."""


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' UNet2DConditionModel config that shape the network."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    # Heads per block, in spite of its name: diffusers kept the name of an old mistake.
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    dtype: Any = jnp.float32  # of the computation; norms' statistics and softmax stay float32

    @classmethod
    def from_json(cls, json: dict, **overrides) -> "UNetConfig":
        return from_json(cls, json, FIXED, **overrides)

    @property
    def heads(self) -> tuple[int, ...]:
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)


def timestep_embedding(timesteps: Int[Array, "B"], channels: int, config: UNetConfig) -> Float[Array, "B c"]:
    """Sinusoids of the timestep, float32 (Ho et al. 2020)."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - config.freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles)) if config.flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


class TimestepEmbedding(nn.Module):
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B c"]) -> Float[Array, "B {self.channels}"]:
        x = nn.silu(nn.Dense(self.channels, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.channels, dtype=self.dtype, name="linear_2")(x)


def resnet(config: UNetConfig, channels: int, j: int) -> ResnetBlock2D:
    return ResnetBlock2D(channels, config.norm_num_groups, config.norm_eps, config.dtype, name=f"resnets_{j}")


def transformer(config: UNetConfig, heads: int, j: int) -> Transformer2D:
    linear = config.use_linear_projection
    return Transformer2D(heads, config.norm_num_groups, linear, config.dtype, name=f"attentions_{j}")


class DownBlock(nn.Module):
    """DownBlock2D or, with attention, CrossAttnDownBlock2D."""

    config: UNetConfig
    channels: int
    heads: int | None  # None: no attention
    downsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], time, context) -> list[Float[Array, "B _ _ _"]]:
        """Returns the output of every layer: the skip connections; the last one is the block's output."""
        skips = []
        for j in range(self.config.layers_per_block):
            x = resnet(self.config, self.channels, j)(x, time)
            if self.heads is not None:
                x = transformer(self.config, self.heads, j)(x, context)
            skips.append(x)
        if self.downsample:
            skips.append(Downsample2D(self.channels, 1, self.config.dtype, name="downsamplers_0")(x))
        return skips


class MidBlock(nn.Module):
    config: UNetConfig
    channels: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], time, context) -> Float[Array, "B h w c"]:
        x = resnet(self.config, self.channels, 0)(x, time)
        x = transformer(self.config, self.heads, 0)(x, context)
        return resnet(self.config, self.channels, 1)(x, time)


class UpBlock(nn.Module):
    """UpBlock2D or, with attention, CrossAttnUpBlock2D. Takes its skip connections off the end of `skips`."""

    config: UNetConfig
    channels: int
    heads: int | None
    upsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], skips: list, time, context) -> Float[Array, "B _ _ {self.channels}"]:
        for j in range(self.config.layers_per_block + 1):
            x = resnet(self.config, self.channels, j)(jnp.concatenate([x, skips.pop()], axis=-1), time)
            if self.heads is not None:
                x = transformer(self.config, self.heads, j)(x, context)
        if self.upsample:
            x = Upsample2D(self.channels, self.config.dtype, name="upsamplers_0")(x)
        return x


DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # type: has attention
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


class UNet2DConditionModel(nn.Module):
    """Predicts the noise, or the velocity, in noisy latents, given the timestep and the text states."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self, latents: Float[Array, "B h w c"], timesteps: Int[Array, "B"], context: Float[Array, "B K e"]
    ) -> Float[Array, "B h w c"]:
        cfg = self.config
        channels, last = cfg.block_out_channels, len(cfg.block_out_channels) - 1
        context = context.astype(cfg.dtype)
        time = timestep_embedding(timesteps, channels[0], cfg).astype(cfg.dtype)
        time = TimestepEmbedding(4 * channels[0], cfg.dtype, name="time_embedding")(time)

        x = conv3x3(channels[0], cfg.dtype, "conv_in")(latents.astype(cfg.dtype))
        skips = [x]
        for i, block in enumerate(cfg.down_block_types):
            heads = cfg.heads[i] if DOWN_BLOCKS[block] else None
            skips += DownBlock(cfg, channels[i], heads, i < last, name=f"down_blocks_{i}")(skips[-1], time, context)
        x = MidBlock(cfg, channels[-1], cfg.heads[-1], name="mid_block")(skips[-1], time, context)
        for i, block in enumerate(cfg.up_block_types):
            heads = cfg.heads[last - i] if UP_BLOCKS[block] else None
            x = UpBlock(cfg, channels[last - i], heads, i < last, name=f"up_blocks_{i}")(x, skips, time, context)
        x = nn.silu(nn.GroupNorm(cfg.norm_num_groups, epsilon=cfg.norm_eps, dtype=cfg.dtype, name="conv_norm_out")(x))
        return conv3x3(cfg.out_channels, cfg.dtype, "conv_out")(x)
