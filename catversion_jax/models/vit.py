"""The plain vision transformer of DINO, in the layout of transformers' ViTModel."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from catversion_jax.models.clip import CLIPEncoder, ImageConfig, layer_norm
from catversion_jax.models.parametrized import ZEROS, Conv
from catversion_jax.utils.json_config import Positive, Side, Width
from catversion_jax.utils.types import Array, Float

FIXED = {
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "model_type": "vit",
    "num_channels": 3,
    "qkv_bias": True,
}
"""Config keys with the only value that is implemented; any other would be a different network."""


@dataclass(frozen=True)
class ViTConfig(ImageConfig):
    """The fields of a ViT, whose layers are CLIP's; the defaults are those of ViT-S/16."""

    hidden_size: Width = 384
    intermediate_size: Width = 1536
    num_attention_heads: Width = 6
    hidden_act: str = "gelu"
    layer_norm_eps: Positive = 1e-12
    patch_size: Side = 16


class ViTModel(nn.Module):
    config: ViTConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B c"]:
        """Returns the class token's state, not normalized, for pixels with ImageNet's mean and deviation removed."""
        cfg = self.config
        patch = (cfg.patch_size, cfg.patch_size)
        x = Conv(cfg.hidden_size, patch, patch, padding="VALID", dtype=cfg.dtype, name="patch_embedding")(pixels)
        x = x.reshape(x.shape[0], -1, cfg.hidden_size)
        token = self.param("cls_token", ZEROS, (1, 1, cfg.hidden_size)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, cfg.hidden_size)), x], axis=1)
        x = x + self.param("position_embeddings", ZEROS, (1, x.shape[1], cfg.hidden_size)).astype(x.dtype)
        x = CLIPEncoder(cfg, name="encoder")(x, jnp.ones((x.shape[1], x.shape[1]), bool))[-1]
        return layer_norm(cfg, "layernorm")(x[:, 0])
