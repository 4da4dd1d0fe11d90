"""CatVersion: learned keys and values, concatenated in front of the text encoder's own.

The method (arXiv 2311.14631, section 3.2) in one formula, for each of the last three self-attention
layers of the text encoder and each of its heads:

    Attn = softmax(Q [dK ; K]^T / sqrt(D) + mask) [dV ; V]

which equals (1 - m(q)) Attn(Q, K, V) + m(q) Attn(Q, dK, dV), where m(q) is the attention mass that
query q gives to the prefix: a learned residual on the attention output. The prefix (dK, dV) is all that
is trained. Its layout, here and in every file we write, is float32 [P, L, 2, H, D], 2 = (key, value).
A model with two text encoders (SDXL) has a prefix in each. catversion.py has it as the training step takes it.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from catversion_jax.utils.types import Array, Bool, Float, Key

SCOPES = ("all", "trigger")
"""`all` (the paper): every token of every prompt sees the prefix.
`trigger`: only tokens at and after the class word do, and only in prompts that hold it."""


class Prefix(flax.struct.PyTreeNode):
    """What the hook in the text encoder takes: the learned embeddings and who sees them."""

    embeddings: Float[Array, "P L 2 H D"]
    logit_bias: Float[Array, ""]  # added to the prefix logits; -inf removes the prefix exactly
    token_mask: Bool[Array, "B Q #P"]  # which query positions see the prefix
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def at(self, layer: int) -> "LayerPrefix | None":
        """The share of one text encoder layer, or None where the layer has none."""
        if layer not in self.layers:
            return None
        key, value = jnp.moveaxis(self.embeddings[:, self.layers.index(layer)], 1, 0)
        return LayerPrefix(key, value, self.logit_bias, self.token_mask)


class LayerPrefix(flax.struct.PyTreeNode):
    """`Prefix` at one layer."""

    key: Float[Array, "P H D"]
    value: Float[Array, "P H D"]
    logit_bias: Float[Array, ""]
    token_mask: Bool[Array, "B Q #P"]


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Ascending non-negative layer indices; negative ones count from the last layer that reaches the UNet.

    Raises ValueError for an index outside the text encoder's `depth` layers, a double one, or none at all.
    """
    resolved = sorted(layer + depth if layer < 0 else layer for layer in layers)
    if not resolved or len(set(resolved)) < len(resolved) or not 0 <= resolved[0] <= resolved[-1] < depth:
        raise ValueError(f"layers {tuple(layers)}: expected distinct indices into {depth} text encoder layers")
    return tuple(resolved)


def init_prefix(
    key: Key[Array, ""], length: int, layers: int, heads: tuple[int, int], std: float
) -> Float[Array, "P L 2 H D"]:
    """A prefix drawn from N(0, std^2), float32; `heads` are (H, D) of its text encoder."""
    return std * jax.random.normal(key, (length, layers, 2, *heads), jnp.float32)


def strength_bias(logit_bias: float, strength: Float[Array, ""] | float) -> Float[Array, ""]:
    """The prefix logit's bias at a strength in [0, 1]: log(strength) is added, so 0 removes the prefix exactly."""
    return logit_bias + jnp.log(jnp.float32(strength))


def attend(
    query: Float[Array, "B Q H D"],
    key: Float[Array, "B K H D"],
    value: Float[Array, "B K H D"],
    mask: Bool[Array, "Q K"],
    prefix: LayerPrefix | None = None,
) -> Float[Array, "B Q H D"]:
    """Softmax attention with the prefix in front of the keys and values; logits and softmax in float32.

    Every query position that `prefix.token_mask` names sees all prefix positions; `mask` (True = may see)
    governs the tokens alone. Without a prefix this is the text encoder's own attention.
    """

    def logits(keys, equation):
        return jnp.einsum(equation, query * query.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32)

    scores = jnp.where(mask, logits(key, "bqhd,bkhd->bhqk"), -jnp.inf)
    if prefix is None:
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    bias = jnp.where(prefix.token_mask, prefix.logit_bias, -jnp.inf)  # [B, Q, P]
    prefix_scores = logits(prefix.key.astype(key.dtype), "bqhd,phd->bhqp") + bias[:, None]
    length = prefix.key.shape[0]
    weights = jax.nn.softmax(jnp.concatenate([prefix_scores, scores], axis=-1)).astype(value.dtype)
    residual = jnp.einsum("bhqp,phd->bqhd", weights[..., :length], prefix.value.astype(value.dtype))
    return residual + jnp.einsum("bhqk,bkhd->bqhd", weights[..., length:], value)
