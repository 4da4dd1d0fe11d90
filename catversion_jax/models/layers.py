"""Building blocks of the UNet and the VAE, NHWC: residual blocks, resampling and the spatial transformer."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from catversion_jax.models.activations import gelu
from catversion_jax.models.attention import dot_product_attention, probabilities
from catversion_jax.models.convolution import Conv3x3
from catversion_jax.models.norms import LayerNorm
from catversion_jax.models.parametrized import Conv, Dense
from catversion_jax.utils.types import Array, Float

# The published weights were trained with this epsilon and the exact GELU (CompVis' ldm/modules/attention.py, Normalize
# and GEGLU; diffusers' PyTorch classes too). The last Flax classes of diffusers used 1e-5 and the tanh approximation.
TRANSFORMER_GROUP_NORM_EPS = 1e-6


class ResnetBlock2D(nn.Module):
    channels: int
    groups: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], time: Float[Array, "B t"] | None = None
    ) -> Float[Array, "B h w {self.channels}"]:
        norm = partial(nn.GroupNorm, self.groups, epsilon=self.eps, dtype=self.dtype)
        y = Conv3x3(self.channels, self.dtype, name="conv1")(nn.silu(norm(name="norm1")(x)))
        if time is not None:
            y += Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None]
        y = Conv3x3(self.channels, self.dtype, name="conv2")(nn.silu(norm(name="norm2")(y)))
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


class Downsample2D(nn.Module):
    channels: int
    padding: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ {self.channels}"]:
        return Conv(self.channels, (3, 3), strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    channels: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B _ _ {self.channels}"]:
        """Doubles height and width, or brings them to `size`: what was halved may have been odd."""
        b, h, w, c = x.shape
        if size in (None, (2 * h, 2 * w)):
            x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        else:
            rows, columns = (np.arange(to) * by // to for to, by in zip(size, (h, w), strict=True))
            x = x[:, rows][:, :, columns]
        return Conv3x3(self.channels, self.dtype, name="conv")(x)


class Attention(nn.Module):
    """Multi-head attention of x over `context`; softmax in float32.

    Applied with mutable="intermediates" it also sows its `probabilities`, which are not computed otherwise.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B Q c"], context: Float[Array, "B K e"]) -> Float[Array, "B Q c"]:
        channels = x.shape[-1]

        def project(name, inputs):
            y = Dense(channels, use_bias=False, dtype=self.dtype, name=name)(inputs)
            return y.reshape(*inputs.shape[:2], self.heads, channels // self.heads)

        query, key, value = project("to_q", x), project("to_k", context), project("to_v", context)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "probabilities", probabilities(query, key))
        y = dot_product_attention(query, key, value)
        return Dense(channels, dtype=self.dtype, name="to_out_0")(y.reshape(x.shape))


class GEGLU(nn.Module):
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B Q c"]) -> Float[Array, "B Q {self.channels}"]:
        x, gate = jnp.split(Dense(2 * self.channels, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B Q c"]) -> Float[Array, "B Q c"]:
        channels = x.shape[-1]
        x = GEGLU(4 * channels, self.dtype, name="net_0")(x)
        return Dense(channels, dtype=self.dtype, name="net_2")(x)


class BasicTransformerBlock(nn.Module):
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B Q c"], context: Float[Array, "B K e"]) -> Float[Array, "B Q c"]:
        norm = partial(LayerNorm, 1e-5, self.dtype)
        y = norm(name="norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="attn1")(y, y)
        x = x + Attention(self.heads, self.dtype, name="attn2")(norm(name="norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm(name="norm3")(x))


class Transformer2D(nn.Module):
    heads: int
    depth: int  # transformer blocks
    groups: int
    linear_projection: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], context: Float[Array, "B K e"]) -> Float[Array, "B h w c"]:
        b, h, w, c = x.shape
        # A 1x1 convolution is a matrix product; only the shape of the published kernels differs.
        project = partial(Dense, c) if self.linear_projection else partial(Conv, c, (1, 1))
        y = nn.GroupNorm(self.groups, epsilon=TRANSFORMER_GROUP_NORM_EPS, dtype=self.dtype, name="norm")(x)
        y = project(dtype=self.dtype, name="proj_in")(y).reshape(b, h * w, c)
        for k in range(self.depth):
            y = BasicTransformerBlock(self.heads, self.dtype, name=f"transformer_blocks_{k}")(y, context)
        return x + project(dtype=self.dtype, name="proj_out")(y.reshape(b, h, w, c))
