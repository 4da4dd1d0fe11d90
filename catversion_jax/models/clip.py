"""CLIP's text and vision encoders; the text encoder has a hook for the prefix in each self-attention layer.

Parameter trees are those of FlaxCLIPTextModel(WithProjection) and FlaxCLIPVisionModelWithProjection.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
from msgspec import Meta

from catversion_jax.models.activations import ACTIVATIONS
from catversion_jax.models.norms import LayerNorm
from catversion_jax.models.parametrized import ZEROS, Conv, Dense, Embed
from catversion_jax.models.prefix_attention import LayerPrefix, Prefix, attend
from catversion_jax.utils.json_config import Depth, Positive, Side, Width, not_in_file, require
from catversion_jax.utils.types import Array, Bool, Float, Int


@dataclass(frozen=True)
class CLIPConfig:
    """The fields that CLIP's two encoders share, named as in transformers' configs."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    hidden_act: str = "quick_gelu"  # a key of ACTIVATIONS
    layer_norm_eps: Positive = 1e-5
    dtype: Any = not_in_file(jnp.float32)  # of the computation

    def __post_init__(self):
        require(
            self.hidden_act in ACTIVATIONS, f"hidden_act={self.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}",
        )

    @property
    def heads(self) -> tuple[int, int]:
        """Number and size of the attention heads: (H, D)."""
        return self.num_attention_heads, self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class CLIPTextConfig(CLIPConfig):
    """The text encoder's fields. The pipeline sets `skip`, the number of last layers that the UNet does not use."""

    vocab_size: Annotated[int, Meta(ge=1, le=2**20)] = 49408
    max_position_embeddings: Width = 77
    projection_dim: Width | None = None  # None: the tree has no text_projection
    eos_token_id: Annotated[int, Meta(ge=0, lt=2**20)] = 2
    skip: int = not_in_file(0)  # 1 in SDXL: its UNet takes the penultimate layer's output, without the final norm

    @property
    def depth(self) -> int:
        """The number of layers that reach the UNet's cross-attention."""
        return self.num_hidden_layers - self.skip

    @property
    def pools(self) -> bool:
        """Whether the UNet also takes the prompt's pooled embedding: in SDXL, from the second text encoder."""
        return self.skip > 0 and self.projection_dim is not None


@dataclass(frozen=True)
class ImageConfig(CLIPConfig):
    """What the configs of image encoders share: a square image is cut into square patches."""

    image_size: Side = 224
    patch_size: Side = 32

    def __post_init__(self):
        super().__post_init__()
        patch, image = self.patch_size, self.image_size
        require(patch <= image, f"patch_size={patch} exceeds image_size={image}")


@dataclass(frozen=True)
class CLIPVisionConfig(ImageConfig):
    projection_dim: Width = 512


class CLIPAttention(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q c"], mask: Bool[Array, "Q Q"], prefix: LayerPrefix | None
    ) -> Float[Array, "B Q c"]:
        cfg = self.config
        heads = (*x.shape[:2], *cfg.heads)
        query, key, value = (
            Dense(cfg.hidden_size, dtype=cfg.dtype, name=name)(x).reshape(heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = attend(query, key, value, mask, prefix).reshape(x.shape)
        return Dense(cfg.hidden_size, dtype=cfg.dtype, name="out_proj")(x)


class CLIPMLP(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B Q c"]) -> Float[Array, "B Q c"]:
        x = Dense(self.config.intermediate_size, dtype=self.config.dtype, name="fc1")(x)
        x = ACTIVATIONS[self.config.hidden_act](x)
        return Dense(self.config.hidden_size, dtype=self.config.dtype, name="fc2")(x)


def layer_norm(config: CLIPConfig, name: str | None = None) -> LayerNorm:
    return LayerNorm(config.layer_norm_eps, config.dtype, name=name)


class CLIPEncoderLayer(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q c"], mask: Bool[Array, "Q Q"], prefix: LayerPrefix | None
    ) -> Float[Array, "B Q c"]:
        y = layer_norm(self.config, "layer_norm1")(x)
        x = x + CLIPAttention(self.config, name="self_attn")(y, mask, prefix)
        y = layer_norm(self.config, "layer_norm2")(x)
        return x + CLIPMLP(self.config, name="mlp")(y)


class CLIPLayers(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q c"], mask: Bool[Array, "Q Q"], prefix: Prefix | None, start: int, stop: int
    ) -> list[Float[Array, "B Q c"]]:
        states = [x]
        for i in range(start, stop):
            hook = None if prefix is None else prefix.at(i)
            states.append(CLIPEncoderLayer(self.config, name=str(i))(states[-1], mask, hook))
        return states


class CLIPEncoder(nn.Module):
    config: CLIPConfig

    @nn.compact
    def __call__(self, x, mask, prefix=None, start=0, stop=None) -> list[Float[Array, "B Q c"]]:
        """Runs layers start to stop - 1; returns the first one's input and the output of each."""
        stop = self.config.num_hidden_layers if stop is None else stop
        return CLIPLayers(self.config, name="layers")(x, mask, prefix, start, stop)


class CLIPTextEmbeddings(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, token_ids: Int[Array, "B Q"]) -> Float[Array, "B Q c"]:
        cfg = self.config
        tokens = Embed(cfg.vocab_size, cfg.hidden_size, dtype=cfg.dtype, name="token_embedding")
        positions = Embed(
            cfg.max_position_embeddings,
            cfg.hidden_size,
            dtype=cfg.dtype,
            name="position_embedding",
        )
        return tokens(token_ids) + positions(jnp.arange(token_ids.shape[-1]))


class CLIPTextTransformer(nn.Module):
    config: CLIPTextConfig

    def setup(self):
        self.embeddings = CLIPTextEmbeddings(self.config)
        self.encoder = CLIPEncoder(self.config)
        self.final_layer_norm = layer_norm(self.config)


class CLIPTextModel(nn.Module):
    """The text encoder in parts: the layers below the prefix run once per prompt, those above it in every step.

    `__call__` runs all of it: `embed`, `layers` and `finish`. base/text_states.py runs the two halves: `embed` and the
    lower `layers`, then `upper`.
    """

    config: CLIPTextConfig

    def setup(self):
        self.text_model = CLIPTextTransformer(self.config)
        if self.config.projection_dim is not None:
            self.text_projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.config.dtype)

    def embed(self, token_ids: Int[Array, "B Q"]) -> Float[Array, "B Q c"]:
        return self.text_model.embeddings(token_ids)

    def layers(
        self, x: Float[Array, "B Q c"], prefix: Prefix | None = None, start: int = 0, stop: int | None = None
    ) -> list[Float[Array, "B Q c"]]:
        """Runs layers start to stop - 1 under the causal mask; returns the first one's input and the output of each."""
        mask = jnp.tril(jnp.ones((x.shape[-2], x.shape[-2]), bool))
        return self.text_model.encoder(x, mask, prefix, start, stop)

    def finish(self, x: Float[Array, "B Q c"]) -> Float[Array, "B Q c"]:
        """Applies the final layer norm."""
        return self.text_model.final_layer_norm(x)

    def end(self, token_ids: Int[Array, "B Q"]) -> Int[Array, "B"]:
        """The position of the end token."""
        # Configs written before transformers' pull request 24773 have a wrong eos_token_id of 2. For these,
        # transformers' modeling_clip.py takes the largest id, which in CLIP's vocabulary is the end token's (49407).
        # argmax finds the first one: Stable Diffusion 1.x also pads with it.
        is_end = token_ids == self.config.eos_token_id
        return jnp.argmax(token_ids if self.config.eos_token_id == 2 else is_end, axis=-1)

    def project(self, x: Float[Array, "B Q c"], end: Int[Array, "B"]) -> Float[Array, "B e"]:
        """Projects the final state at the end token to the embedding space shared with CLIP's image encoder."""
        return self.text_projection(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])

    def upper(
        self, hidden: Float[Array, "B Q c"], end: Int[Array, "B"], prefix: Prefix | None, start: int
    ) -> tuple[Float[Array, "B Q c"], Float[Array, "B e"] | None]:
        """Runs the layers from `start` on; returns what the UNet takes from this encoder.

        That is the text states and, if the model `pools`, the prompt's pooled embedding.
        """
        # states[i] is the input of layer start + i. With `skip`, the UNet's states leave before the last layers and the
        # final norm, but the pooled embedding needs all of them, so every layer runs.
        states = self.layers(hidden, prefix, start)
        last = self.finish(states[-1])
        context = states[self.config.depth - start] if self.config.skip else last
        return context, self.project(last, end) if self.config.pools else None

    def __call__(
        self, token_ids: Int[Array, "B Q"], prefix: Prefix | None = None
    ) -> dict[str, Float[Array, "..."] | list[Float[Array, "B Q c"]]]:
        """Returns hidden_states, last_hidden_state and, if the model has a projection, text_embeds.

        As in transformers, the last of hidden_states is taken before the final norm.
        """
        states = self.layers(self.embed(token_ids), prefix)
        last = self.finish(states[-1])
        out: dict[str, Array | list[Array]] = {"hidden_states": states, "last_hidden_state": last}
        if self.config.projection_dim is not None:
            out["text_embeds"] = self.project(last, self.end(token_ids))
        return out


class CLIPVisionEmbeddings(nn.Module):
    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B Q c"]:
        cfg = self.config
        patch = (cfg.patch_size, cfg.patch_size)
        class_embedding = self.param("class_embedding", ZEROS, (cfg.hidden_size,))
        x = Conv(
            cfg.hidden_size, patch, patch, padding="VALID", use_bias=False, dtype=cfg.dtype, name="patch_embedding"
        )(pixels)
        x = x.reshape(x.shape[0], -1, cfg.hidden_size)
        first = jnp.broadcast_to(class_embedding.astype(x.dtype), (x.shape[0], 1, cfg.hidden_size))
        x = jnp.concatenate([first, x], axis=1)
        positions = Embed(x.shape[1], cfg.hidden_size, dtype=cfg.dtype, name="position_embedding")
        return x + positions(jnp.arange(x.shape[1]))


class CLIPVisionTransformer(nn.Module):
    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B c"]:
        x = CLIPVisionEmbeddings(self.config, name="embeddings")(pixels)
        x = layer_norm(self.config, "pre_layrnorm")(x)  # sic: the published checkpoints spell it so
        everywhere = jnp.ones((x.shape[1], x.shape[1]), bool)
        x = CLIPEncoder(self.config, name="encoder")(x, everywhere)[-1]
        return layer_norm(self.config, "post_layernorm")(x[:, 0])


class CLIPVisionModel(nn.Module):
    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B e"]:
        """Returns image embeddings, not normalized, for pixels with CLIP's mean and standard deviation removed."""
        cfg = self.config
        x = CLIPVisionTransformer(cfg, name="vision_model")(pixels)
        return Dense(cfg.projection_dim, use_bias=False, dtype=cfg.dtype, name="visual_projection")(x)
