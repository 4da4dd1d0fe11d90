"""CatVersion's attention: the learned prefix in front of the keys and values; it is trained by methods/catversion.py.

The method (Zhao et al. 2023, arXiv 2311.14631, section 3.2) in one formula, for each of the last three self-attention
layers of the text encoder and each of its heads:

    Attn = softmax(Q [dK ; K]^T / sqrt(D) + mask) [dV ; V]

which equals Attn(Q, K, V) + m(q) (Attn(Q, dK, dV) - Attn(Q, K, V)), where m(q) is the attention mass that query q gives
to the prefix: a learned residual on the attention output. Once it is learned, a strength s scales it:

    Attn = Attn(Q, K, V) + s m(q) (Attn(Q, dK, dV) - Attn(Q, K, V))

which is the base model at s = 0 and the prefix as it was trained at s = 1.

    learned         the prefix (dK, dV) and nothing else: float32 [P, L, 2, H, D], 2 = (key, value), here and in every
                    file we write; a model with two text encoders (SDXL) has a prefix in each
    initialisation  N(0, std^2) by `init_prefix`; the published std is 1
    where it enters `attend`, which every self-attention layer of the text encoder calls (CLIPAttention in clip.py)
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from catversion_jax.utils.types import AnyArray, Array, Bool, Float, Key

SCOPES = ("all", "trigger")
"""`all` (the paper): every token of every prompt sees the prefix.
`trigger`: only the class word and the tokens after it see it, and only in prompts that contain the class word."""


class Prefix(flax.struct.PyTreeNode):
    """A prefix as the text encoder takes it: the learned keys and values, and the token mask of who sees them."""

    embeddings: Float[Array, "P L 2 H D"]
    logit_bias: float = flax.struct.field(pytree_node=False)  # added to the prefix logits
    strength: Float[Array, ""]  # scales the residual; 1 is as trained
    token_mask: Bool[AnyArray, "B Q #P"]  # the query positions that see the prefix
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def at(self, layer: int) -> "LayerPrefix | None":
        """The prefix of one text encoder layer, or None if the layer has no prefix."""
        if layer not in self.layers:
            return None
        key, value = jnp.moveaxis(self.embeddings[:, self.layers.index(layer)], 1, 0)
        return LayerPrefix(key, value, self.logit_bias, self.strength, self.token_mask)


class LayerPrefix(flax.struct.PyTreeNode):
    """The prefix of one layer."""

    key: Float[Array, "P H D"]
    value: Float[Array, "P H D"]
    logit_bias: float = flax.struct.field(pytree_node=False)
    strength: Float[Array, ""]
    token_mask: Bool[AnyArray, "B Q #P"]


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Returns ascending, non-negative layer indices; negative ones count from the last layer that reaches the UNet.

    Raises ValueError for an index outside the text encoder's `depth` layers, a repeated index, or no index.
    """
    resolved = sorted(layer + depth if layer < 0 else layer for layer in layers)
    if not resolved or len(set(resolved)) < len(resolved) or not 0 <= resolved[0] <= resolved[-1] < depth:
        raise ValueError(f"layers {tuple(layers)}: expected distinct indices into {depth} text encoder layers")
    return tuple(resolved)


def init_prefix(
    key: Key[Array, ""], length: int, layers: int, heads: tuple[int, int], std: float
) -> Float[Array, "P L 2 H D"]:
    """Samples an initial prefix from N(0, std^2), float32; `heads` is (H, D) of its text encoder."""
    return std * jax.random.normal(key, (length, layers, 2, *heads), jnp.float32)


def attend(
    query: Float[Array, "B Q H D"],
    key: Float[Array, "B K H D"],
    value: Float[Array, "B K H D"],
    mask: Bool[Array, "Q K"],
    prefix: LayerPrefix | None = None,
) -> Float[Array, "B Q H D"]:
    """Softmax attention with the prefix in front of the keys and values; logits and softmax in float32.

    A query position in `prefix.token_mask` sees all prefix positions; `mask` (True = may see) applies to the tokens
    only. Without a prefix this is the text encoder's own attention.
    """

    def logits(keys, equation):
        return jnp.einsum(equation, query * query.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32)

    scores = jnp.where(mask, logits(key, "bqhd,bkhd->bhqk"), -jnp.inf)
    unchanged = jax.nn.softmax(scores)
    if prefix is None:
        return jnp.einsum("bhqk,bkhd->bqhd", unchanged.astype(value.dtype), value)
    # [dK ; K] and [dV ; V] of the formula are never built. The tokens' keys have a batch axis and the causal mask; the
    # prefix has neither, but its own bias and token mask. So the two logits are computed apart, which needs no copy of
    # the prefix for each prompt, and joined before the softmax, which has to normalize over both.
    bias = jnp.where(prefix.token_mask, prefix.logit_bias, -jnp.inf)  # [B, Q, P]
    prefix_scores = logits(prefix.key.astype(key.dtype), "bqhd,phd->bhqp") + bias[:, None]
    length = prefix.key.shape[0]
    weights = jax.nn.softmax(jnp.concatenate([prefix_scores, scores], axis=-1))
    of_prefix, of_tokens = weights[..., :length], weights[..., length:]
    # The strength takes a part of the prefix's weight, and the tokens get it back as they would share it without a
    # prefix. At strength 1 both terms are those of the softmax, to the bit.
    given_back = ((1 - prefix.strength) * of_prefix).sum(-1, keepdims=True)
    of_prefix, of_tokens = prefix.strength * of_prefix, of_tokens + given_back * unchanged
    residual = jnp.einsum("bhqp,phd->bqhd", of_prefix.astype(value.dtype), prefix.value.astype(value.dtype))
    return residual + jnp.einsum("bhqk,bkhd->bqhd", of_tokens.astype(value.dtype), value)
