"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL (diffusers' UNet2DConditionModel), NHWC."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from msgspec import Meta

from catversion_jax.models.convolution import Conv3x3
from catversion_jax.models.layers import Downsample2D, ResnetBlock2D, Transformer2D, Upsample2D
from catversion_jax.models.parametrized import Dense
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.json_config import Depth, Positive, Side, Width, from_json, not_in_file, require
from catversion_jax.utils.types import AnyArray, Array, Float, Int

FIXED = {
    "act_fn": "silu",
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
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
}
"""Config keys with the only value that is implemented; any other would be a different network (upscalers, ...)."""

ADDED_EMBEDDINGS = (None, "text_time")
"""The supported values of addition_embed_type: none, or SDXL's."""

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # whether a type has attention
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
BLOCKS = ", ".join([*DOWN_BLOCKS, *UP_BLOCKS])
SIZES = 6
"""Numbers of SDXL's size conditioning."""
MOST_TRANSFORMERS = 256
"""Stable Diffusion XL has 26."""


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' UNet2DConditionModel config that shape the network."""

    sample_size: Side = 64
    in_channels: Width = 4
    out_channels: Width = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=8)] = (320, 640, 1280, 1280)
    layers_per_block: Depth = 2
    # The number of heads per block, in spite of its name, which diffusers keeps for old configs (its issue 2011).
    attention_head_dim: Width | tuple[Width, ...] = 8
    cross_attention_dim: Width = 1280
    use_linear_projection: bool = False
    norm_num_groups: Width = 32
    norm_eps: Positive = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Meta(ge=0, le=1)] = 0
    transformer_layers_per_block: Depth | tuple[Depth, ...] = 1
    addition_embed_type: str | None = None  # one of ADDED_EMBEDDINGS
    addition_time_embed_dim: Width | None = None
    projection_class_embeddings_input_dim: Width | None = None
    resolution: int = not_in_file(512)  # pixels along each side of an image of sample_size
    dtype: Any = not_in_file(jnp.float32)  # of the computation; norms' statistics and softmax stay float32
    remat: bool = not_in_file(False)  # layers are recomputed in the backward pass: less memory, a third more work

    def __post_init__(self):
        blocks = len(self.block_out_channels)
        unknown = [{*self.down_block_types} - DOWN_BLOCKS.keys(), {*self.up_block_types} - UP_BLOCKS.keys()]
        require(not any(unknown), f"blocks of type {listed(sorted(set().union(*unknown)))}, expected {BLOCKS}")
        lists = (self.down_block_types, self.up_block_types, self.heads, self.depths)
        require({len(each) for each in lists} == {blocks}, f"a list for other than the {blocks} block_out_channels")
        require(
            self.in_channels == self.out_channels,
            f"in_channels={self.in_channels} and out_channels={self.out_channels} differ",
        )
        require(
            self.layers_per_block * sum(self.depths) <= MOST_TRANSFORMERS,
            f"more than {MOST_TRANSFORMERS} transformer blocks on the way down",
        )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            require(
                channels % self.norm_num_groups == 0,
                f"norm_num_groups={self.norm_num_groups} does not divide {channels} channels",
            )
            require(channels % heads == 0, f"attention_head_dim={heads} does not divide {channels} channels")
        require(
            self.sample_size % 2 ** (blocks - 1) == 0,
            f"sample_size={self.sample_size} cannot be halved {blocks - 1} times",
        )
        waves = [self.block_out_channels[0], self.addition_time_embed_dim or 4]
        odd = [n for n in waves if n % 2 or n <= 2]
        require(not odd, f"sinusoids of {listed(odd)} channels, expected even numbers")
        require(
            self.addition_embed_type is None or (self.pooled_dim or 0) > 0,
            "addition_embed_type, but projection_class_embeddings_input_dim and addition_time_embed_dim do not fit it",
        )

    def layer(self, module: type[nn.Module]) -> type[nn.Module]:
        """A residual block or a transformer, rematerialized if `remat` is set."""
        return nn.remat(module) if self.remat else module

    @classmethod
    def from_json(cls, json: dict, **overrides) -> "UNetConfig":
        config = from_json(cls, json, FIXED, **overrides)
        if config.addition_embed_type not in ADDED_EMBEDDINGS:
            known = " or ".join(map(repr, ADDED_EMBEDDINGS))
            raise UserError(f"UNet: not supported: addition_embed_type={config.addition_embed_type!r} (only {known})")
        return config

    def per_block(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """Expands a field that is either one number for all blocks or one number per block."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        return self.per_block(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        return self.per_block(self.transformer_layers_per_block)

    @property
    def pooled_dim(self) -> int | None:
        """The size of the pooled embedding that SDXL's UNet takes, without the sizes'; None in other models."""
        if self.projection_class_embeddings_input_dim is None or self.addition_time_embed_dim is None:
            return None
        return self.projection_class_embeddings_input_dim - SIZES * self.addition_time_embed_dim

    def time_ids(self, height: int, width: int) -> tuple[int, ...]:
        """SDXL's size conditioning (Podell et al. 2023): an image's original size, its crop's corner and its size.

        `height` and `width` are those of the latents.
        """
        pixels = self.resolution // self.sample_size
        size = (height * pixels, width * pixels)
        return (*size, 0, 0, *size)


class Context(NamedTuple):
    """The UNet's text conditioning."""

    states: Float[AnyArray, "B K e"]  # the text encoders' states, concatenated along the channels
    pooled: Float[AnyArray, "B p"] | None = None  # SDXL: the prompt's pooled embedding


def sinusoids(values: Array, channels: int, config: UNetConfig) -> Float[Array, "*values channels"]:
    """Sinusoidal embeddings, float32, of timesteps (Ho et al. 2020) or of SDXL's sizes."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - config.freq_shift))
    angles = values.astype(jnp.float32)[..., None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles)) if config.flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


class TimestepEmbedding(nn.Module):
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B c"]) -> Float[Array, "B {self.channels}"]:
        x = nn.silu(Dense(self.channels, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.channels, dtype=self.dtype, name="linear_2")(x)


def resnet(config: UNetConfig, channels: int, j: int) -> nn.Module:
    return config.layer(ResnetBlock2D)(
        channels, config.norm_num_groups, config.norm_eps, config.dtype, name=f"resnets_{j}"
    )


def transformer(config: UNetConfig, heads: int, depth: int, j: int) -> nn.Module:
    linear = config.use_linear_projection
    return config.layer(Transformer2D)(
        heads, depth, config.norm_num_groups, linear, config.dtype, name=f"attentions_{j}"
    )


class DownBlock(nn.Module):
    """DownBlock2D or, with attention, CrossAttnDownBlock2D."""

    config: UNetConfig
    channels: int
    heads: int | None  # None: no attention
    depth: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], time, context) -> list[Float[Array, "B _ _ _"]]:
        """Returns the outputs of all layers, which are the skip connections; the last one is the block's output."""
        skips = []
        for j in range(self.config.layers_per_block):
            x = resnet(self.config, self.channels, j)(x, time)
            if self.heads is not None:
                x = transformer(self.config, self.heads, self.depth, j)(x, context)
            skips.append(x)
        if self.downsample:
            skips.append(Downsample2D(self.channels, 1, self.config.dtype, name="downsamplers_0")(x))
        return skips


class MidBlock(nn.Module):
    config: UNetConfig
    channels: int
    heads: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], time, context) -> Float[Array, "B h w c"]:
        x = resnet(self.config, self.channels, 0)(x, time)
        x = transformer(self.config, self.heads, self.depth, 0)(x, context)
        return resnet(self.config, self.channels, 1)(x, time)


class UpBlock(nn.Module):
    """UpBlock2D or, with attention, CrossAttnUpBlock2D. Pops its skip connections off the end of `skips`."""

    config: UNetConfig
    channels: int
    heads: int | None
    depth: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], skips: list, time, context) -> Float[Array, "B _ _ {self.channels}"]:
        for j in range(self.config.layers_per_block + 1):
            x = resnet(self.config, self.channels, j)(jnp.concatenate([x, skips.pop()], axis=-1), time)
            if self.heads is not None:
                x = transformer(self.config, self.heads, self.depth, j)(x, context)
        if self.upsample:
            x = Upsample2D(self.channels, self.config.dtype, name="upsamplers_0")(x, skips[-1].shape[1:3])
        return x


class UNet2DConditionModel(nn.Module):
    """Predicts the noise, or the velocity, of noisy latents from the timestep and the text conditioning."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B h w c"],
        timesteps: Int[Array, "B"] | Float[Array, "B"],
        context: Float[Array, "B K e"],
        pooled: Float[Array, "B p"] | None = None,
    ) -> Float[Array, "B h w c"]:
        """`context` and `pooled` are the fields of a Context."""
        cfg = self.config
        channels, last = cfg.block_out_channels, len(cfg.block_out_channels) - 1
        context = context.astype(cfg.dtype)
        time = sinusoids(timesteps, channels[0], cfg).astype(cfg.dtype)
        time = TimestepEmbedding(4 * channels[0], cfg.dtype, name="time_embedding")(time)
        if cfg.addition_embed_type is not None:
            if pooled is None or cfg.addition_time_embed_dim is None:
                raise ValueError("pooled: missing; this UNet is conditioned on the prompt's embedding too")
            sizes = sinusoids(jnp.asarray(cfg.time_ids(*latents.shape[1:3])), cfg.addition_time_embed_dim, cfg).reshape(
                1, -1
            )
            added = jnp.concatenate([pooled, jnp.broadcast_to(sizes, (len(pooled), sizes.size))], axis=-1)
            time += TimestepEmbedding(4 * channels[0], cfg.dtype, name="add_embedding")(added.astype(cfg.dtype))

        x = Conv3x3(channels[0], cfg.dtype, name="conv_in")(latents.astype(cfg.dtype))
        skips = [x]
        for i, block in enumerate(cfg.down_block_types):
            heads = cfg.heads[i] if DOWN_BLOCKS[block] else None
            down = DownBlock(cfg, channels[i], heads, cfg.depths[i], i < last, name=f"down_blocks_{i}")
            skips += down(skips[-1], time, context)
        x = MidBlock(cfg, channels[-1], cfg.heads[-1], cfg.depths[-1], name="mid_block")(skips[-1], time, context)
        for i, block in enumerate(cfg.up_block_types):
            heads = cfg.heads[last - i] if UP_BLOCKS[block] else None
            up = UpBlock(cfg, channels[last - i], heads, cfg.depths[last - i], i < last, name=f"up_blocks_{i}")
            x = up(x, skips, time, context)
        x = nn.silu(nn.GroupNorm(cfg.norm_num_groups, epsilon=cfg.norm_eps, dtype=cfg.dtype, name="conv_norm_out")(x))
        return Conv3x3(cfg.out_channels, cfg.dtype, name="conv_out")(x)
