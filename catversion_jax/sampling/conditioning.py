"""The UNet's conditioning on prompts and concepts, and how far a concept moves it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import BasePipeline, Networks
from catversion_jax.base.prompt_tokens import PromptTokens
from catversion_jax.base.text_states import lower_layers
from catversion_jax.methods import composition
from catversion_jax.methods.base import BaseModel, Method
from catversion_jax.methods.concept_file import Concept
from catversion_jax.models.unet import Context
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.types import AnyArray, Array, Bool, Float, Int, Params

MOST_STATES = 77 * 48
"""That the UNet attends to, if prompts of several lengths are brought to one."""


class Tokens(NamedTuple):
    """The chunks of prompts, of one prompt after the other, for one text encoder."""

    ids: Int[AnyArray, "T Q"]
    mask: Bool[AnyArray, "T Q #P"]  # positions where a concept enters


@partial(jax.jit, static_argnames=("networks", "method"))
def encode_prompts(
    params: tuple[Params, ...],
    tokens: tuple[Tokens, ...],
    learned: Params,
    strength: Float[Array, ""],
    *,
    networks: Networks,
    method: Method,
) -> Context:
    """Encodes the tokens of each text encoder into the UNet's conditioning."""
    of_encoders = zip(networks.text, params, tokens, method.first_layers(networks), strict=True)
    prompts = tuple(lower_layers(encoder, p, *of_encoder, stop=first) for encoder, p, of_encoder, first in of_encoders)
    return method.condition(learned, prompts, params, networks, strength)


def condition(
    pipeline: BasePipeline, prompts: Sequence[str], concept: Concept | None = None, others: Sequence[Concept] = ()
) -> Context:
    """Encodes prompts into the UNet's conditioning.

    Prompts that the concept does not enter get exactly the base model's, and so do all of them at strength 0. `others`
    are concepts of the same prompts, which do not act here, but whose words are not the concept's. All prompts have as
    many chunks.
    """
    return condition_tokens(pipeline, tokens_of(pipeline, prompts, concept), concept, others)


def acts(concept: Concept | None) -> TypeGuard[Concept]:
    """Whether there is a concept to act; at strength 0 it is left out, not scaled by 0: the base model's own states."""
    return concept is not None and concept.strength > 0


def tokens_of(
    pipeline: BasePipeline, prompts: Sequence[str], concept: Concept | None
) -> tuple[tuple[PromptTokens, ...], ...]:
    """Returns what each text encoder is given: the prompts' tokens, with the concept's identifier."""
    given = concept if acts(concept) else None
    return tuple(
        tuple(composition.tokens_for(tokenizer, prompt, given) for prompt in prompts)
        for tokenizer in pipeline.tokenizers
    )


def condition_tokens(
    pipeline: BasePipeline,
    tokens: Sequence[Sequence[PromptTokens]],
    concept: Concept | None,
    others: Sequence[Concept] = (),
) -> Context:
    """Encodes the tokens of each text encoder, as `condition` does."""
    first = tokens[0]
    chunks = condition_chunks(pipeline, tokens, concept, others)
    states = chunks.states.reshape(len(first), -1, chunks.states.shape[-1])
    # As in ComfyUI, the UNet of SDXL takes the pooled embedding of the first chunk alone, whatever the weights.
    pooled = None if chunks.pooled is None else chunks.pooled[:: len(first[0].ids)]
    weights = np.stack([prompt.weights.ravel() for prompt in first])[..., None]
    if (weights == 1).all():
        return Context(states, pooled)
    nothing = condition_chunks(pipeline, tokens_of(pipeline, [""], None), None).states
    nothing = jnp.tile(nothing, (1, len(first[0].ids), 1))
    weighted = nothing + jnp.asarray(weights, states.dtype) * (states - nothing)
    return Context(jnp.where(weights == 1, states, weighted), pooled)


def condition_chunks(
    pipeline: BasePipeline,
    tokens: Sequence[Sequence[PromptTokens]],
    concept: Concept | None,
    others: Sequence[Concept] = (),
) -> Context:
    """Encodes the chunks of prompts, of one prompt after the other, without their weights."""
    token_ids = [np.concatenate([prompt.ids for prompt in prompts]) for prompts in tokens]

    def run(masks, *concept, method) -> Context:
        given = tuple(map(Tokens, token_ids, masks))
        return encode_prompts(pipeline.params["text"], given, *concept, networks=pipeline.networks, method=method)

    def base() -> Context:
        nowhere = [np.zeros((*ids.shape, 1), bool) for ids in token_ids]
        return run(nowhere, {}, jnp.float32(0), method=BaseModel())

    if not acts(concept):
        return base()
    each = zip(pipeline.tokenizers, tokens, strict=True)
    masks = [
        np.concatenate([composition.token_mask(tokenizer, prompt, concept, others) for prompt in prompts])
        for tokenizer, prompts in each
    ]
    touched = np.any([mask.any((1, 2)) for mask in masks], axis=0)
    # Two compiled programs may round differently, so prompts that no concept enters go through the base model's own
    # program: they are promised to give its images bit for bit (docs/method.md).
    if not touched.any():
        return base()
    moved = run(masks, concept.learned, jnp.float32(concept.strength), method=concept.method)
    if touched.all():
        return moved
    return jax.tree.map(lambda x, y: jnp.where(touched.reshape(-1, *[1] * (x.ndim - 1)), x, y), moved, base())


def with_unet(pipeline: BasePipeline, concept: Concept | None) -> BasePipeline:
    """Returns the pipeline with the concept's UNet, if its method changes it."""
    if not acts(concept) or not concept.method.changes_unet:
        return pipeline
    unet = concept.method.unet(concept.learned, pipeline.params["unet"], concept.strength)
    return replace(pipeline, params=pipeline.params | {"unet": unet})


def context(pipeline: BasePipeline, prompts: Sequence[str], concept: Concept | None = None) -> Context:
    """Returns the UNet's conditioning on prompts, float32, on the host; of one length, as `same_length` makes them."""
    # One prompt at a time, so that one compiled program serves any number of prompts.
    parts = same_length([condition(pipeline, [prompt], concept) for prompt in prompts])
    return jax.tree.map(lambda *x: np.concatenate(x).astype(np.float32), *parts)


def same_length(contexts: Sequence[Context]) -> list[Context]:
    """Returns conditioning with the states of each repeated until all have as many.

    The UNet's attention to states that are all there as often is the same as to each of them once.
    """
    lengths = sorted({context.states.shape[1] for context in contexts})
    length = math.lcm(*lengths)
    if length > max(MOST_STATES, lengths[-1]):
        raise UserError(
            f"prompts of {listed(lengths)} tokens, negative ones included: no length in common up to {MOST_STATES}; "
            "shorten one of them by 75 tokens, or give them in calls of their own"
        )
    return [
        context._replace(states=jnp.tile(context.states, (1, length // context.states.shape[1], 1)))
        for context in contexts
    ]


def movement(
    pipeline: BasePipeline, prompts: Sequence[str], concept: Concept, others: Sequence[Concept] = ()
) -> Iterator[str]:
    """Yields a line per prompt: the relative L2 change of its text states, and the token where it is largest.

    The change is against the base model, whose prompt has the concept's identifier too, if the concept has one.
    """
    unet = "; the UNet is another one" if concept.method.changes_unet and concept.strength else ""
    for prompt in prompts:
        given = tokens_of(pipeline, [prompt], concept)
        base, moved = (
            np.asarray(condition_tokens(pipeline, given, *which).states[0], np.float32)
            for which in ((None,), (concept, others))
        )
        steps = np.linalg.norm(moved - base, axis=-1)
        if not steps.any():
            yield f"{prompt!r}: nothing moved{unet}"
            continue
        most = int(steps.argmax())
        token = pipeline.tokenizer.token(int(given[0][0].ids.ravel()[most]))
        change = np.linalg.norm(moved - base) / np.linalg.norm(base)
        yield f"{prompt!r}: moved by {change:.2%}, the most at token {most}, {token!r}{unet}"
