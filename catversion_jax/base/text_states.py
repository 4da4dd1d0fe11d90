"""The text encoder in two halves, split at the first layer that a concept's learned parameters reach.

The text encoder's own weights are frozen, so the states below that layer depend on the prompt alone: `lower_layers`
runs once per prompt, and every training step runs, and differentiates, only `upper_layers`. For CatVersion's default
layers in Stable Diffusion 1.5 that is 3 layers of 12. Textual Inversion starts at layer 0, and DreamBooth, which leaves
the text encoder as it is, after the last one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from catversion_jax.models.clip import CLIPTextModel
from catversion_jax.models.prefix_attention import Prefix
from catversion_jax.models.unet import Context
from catversion_jax.utils.types import AnyArray, Array, Bool, Float, Int, Params


class PromptStates(flax.struct.PyTreeNode):
    """Prompts as the upper layers of one text encoder take them."""

    hidden: Float[AnyArray, "*T Q c"]  # states below the first layer that changes
    token_mask: Bool[AnyArray, "*T Q #P"]  # where the learned parameters, or the P prefix positions, enter
    end: Int[AnyArray, "*T"]  # the end token's position


@partial(jax.jit, static_argnames=("text", "stop"))
def lower_layers(
    text: CLIPTextModel, params: Params, token_ids: Int[Array, "T Q"], token_mask: Bool[Array, "T Q #P"], *, stop: int
) -> PromptStates:
    """Runs the layers below `stop`, which no learned parameter reaches."""

    def run(model: CLIPTextModel):
        return model.layers(model.embed(token_ids), stop=stop)[-1], model.end(token_ids)

    lowered: Any = text.apply({"params": params}, method=run)
    hidden, end = lowered
    return PromptStates(hidden, token_mask, end)


def upper_layers(
    texts: Sequence[CLIPTextModel],
    params: Sequence[Params],
    prompts: Sequence[PromptStates],
    prefixes: Sequence[Prefix | None],
    starts: Sequence[int],
) -> Context:
    """Runs every text encoder's layers from its start on, with its prefix; returns the UNet's text conditioning."""
    outputs: list[Any] = [
        text.apply({"params": p}, prompt.hidden, prompt.end, prefix, start, method=CLIPTextModel.upper)
        for text, p, prompt, prefix, start in zip(texts, params, prompts, prefixes, starts, strict=True)
    ]
    # SDXL's UNet takes the states of both encoders side by side, but the pooled embedding of the second one only.
    return Context(jnp.concatenate([states for states, _ in outputs], axis=-1), outputs[-1][1])
