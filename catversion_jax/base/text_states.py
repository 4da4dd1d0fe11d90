"""The text encoder in two halves: below the first layer that something learned reaches, and from there on."""

from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from catversion_jax.models.clip import CLIPTextModel
from catversion_jax.models.prefix_attention import Prefix
from catversion_jax.models.unet import Context
from catversion_jax.utils.types import Array, Bool, Float, Int, Params


class PromptStates(flax.struct.PyTreeNode):
    """PromptStates as the layers of one text encoder from the prefix on take them."""

    hidden: Float[Array, "*T Q c"]  # states below the prefix
    token_mask: Bool[Array, "*T Q #P"]  # which positions see what was learned, or its P parts
    end: Int[Array, "*T"]  # the end token's position


@partial(jax.jit, static_argnames=("text", "stop"))
def lower_layers(
    text: CLIPTextModel, params: Params, token_ids: Int[Array, "T Q"], token_mask: Bool[Array, "T Q #P"], *, stop: int
) -> PromptStates:
    """The layers below `stop`, which nothing learned reaches: once per prompt."""

    def run(model: CLIPTextModel):
        return model.layers(model.embed(token_ids), stop=stop)[-1], model.end(token_ids)

    hidden, end = text.apply({"params": params}, method=run)
    return PromptStates(hidden, token_mask, end)


def upper_layers(
    texts: Sequence[CLIPTextModel],
    params: Sequence[Params],
    prompts: Sequence[PromptStates],
    prefixes: Sequence[Prefix | None],
    starts: Sequence[int],
) -> Context:
    """The layers of every text encoder from its start on, with its prefix: what the UNet is conditioned on."""
    outputs = [
        text.apply({"params": p}, prompt.hidden, prompt.end, prefix, start, method=CLIPTextModel.upper)
        for text, p, prompt, prefix, start in zip(texts, params, prompts, prefixes, starts, strict=True)
    ]
    return Context(jnp.concatenate([states for states, _ in outputs], axis=-1), outputs[-1][1])
