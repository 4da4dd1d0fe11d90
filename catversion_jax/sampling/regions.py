"""Several concepts in one image: each acts at its own place, by a conditional branch of its own.

In one text encoding concepts mix: the end token and the padding, which the UNet attends to most, see all of them. So
each concept gets its own text states, in which it is alone, and its own branch of the UNet. The branches' predictions
are joined by position (as composed predictions of Liu et al. 2022, arXiv 2206.01714, but each at one place):

    prediction = base + sum over concepts c of region_c (prediction_c - base)

where base is the base model's prediction for the whole prompt. A region is where the base model's own cross-attention
sees the concept's word more than the others' words, and more than THRESHOLD times as much as anywhere.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from catversion_jax.utils.types import AnyArray, Array, Float, Params

THRESHOLD = 0.5
"""Half of the maximum; other values were not compared."""


def attention_to_words(
    intermediates: Params, of_words: Float[AnyArray, "W B K"], latents: tuple[int, int], scale: int = 1
) -> Float[Array, "W B _ _"]:
    """Returns each position's attention to each word, from what the UNet sowed for the B images.

    It is the sum of all cross-attention maps, each scaled to a maximum of 1, so that no layer dominates; the middle
    block, whose map is the coarsest, is left out. `of_words` holds weights of each word's tokens, which sum to 1. The
    maps are brought to `scale` times the height and width of the `latents`.
    """
    words, images, _ = of_words.shape
    height, width = (side * scale for side in latents)
    total = jnp.zeros((words * images, height, width))
    for path, (probabilities,) in flatten_dict(intermediates).items():
        if "attn2" in path and path[0] != "mid_block":
            seen = jnp.einsum("bqk,wbk->wbq", probabilities, of_words)
            seen = seen.reshape(-1, *size_of_map(seen.shape[-1], latents))
            most = jnp.maximum(seen.max((1, 2), keepdims=True), jnp.finfo(seen.dtype).tiny)
            total += jax.image.resize(seen / most, total.shape, "cubic")
    return total.reshape(words, images, height, width)


def size_of_map(positions: int, latents: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width of an attention map: those of the latents, halved until the positions are as many."""
    height, width = latents
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def find_regions(attention: Float[Array, "W B h w"], of_words: Float[AnyArray, "W B K"]) -> Float[Array, "W B h w 1"]:
    """Returns the region of each word: 1 inside and 0 outside. A word that its prompt lacks has none."""
    present = (of_words.sum(-1) > 0)[..., None, None]
    relative = jnp.where(present, attention / attention.max((2, 3), keepdims=True), -jnp.inf)
    most = relative.argmax(0) == jnp.arange(len(attention))[:, None, None, None]
    inside = most & (relative > THRESHOLD)
    # A concept that is alone in its prompt acts everywhere, as it does when no other one is given.
    alone = present & (present.sum(0) == 1)
    return jnp.where(alone, 1.0, inside & present)[..., None]


def join_by_region(
    base: Float[Array, "B h w c"], of_concepts: Float[Array, "W B h w c"], regions: Float[Array, "W B h w 1"]
) -> Float[Array, "B h w c"]:
    """Returns each concept's prediction in its region, and the base model's elsewhere."""
    return (1 - regions.sum(0)) * base + (regions * of_concepts).sum(0)
