"""The UNet's conditioning on prompts and concepts, and how far a concept moves it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import Networks, Pipeline
from catversion_jax.base.text_states import lower_layers
from catversion_jax.methods.base import BaseModel, Method
from catversion_jax.methods.composition import BASE_MODEL, Personalization
from catversion_jax.models.unet import Context
from catversion_jax.utils.types import AnyArray, Array, Bool, Float, Int, Params


class Tokens(NamedTuple):
    """The tokens of prompts for one text encoder."""

    ids: Int[AnyArray, "B Q"]
    mask: Bool[AnyArray, "B Q #P"]  # positions where a concept enters


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


def condition(pipeline: Pipeline, prompts: Sequence[str], personalization: Personalization = BASE_MODEL) -> Context:
    """Encodes prompts into the UNet's conditioning; prompts that no concept enters get exactly the base model's."""
    return condition_tokens(pipeline, token_ids_of(pipeline, prompts, personalization), personalization)


def token_ids_of(
    pipeline: Pipeline, prompts: Sequence[str], personalization: Personalization
) -> tuple[Int[np.ndarray, "B Q"], ...]:
    """Returns what each text encoder is given: the prompts' tokens, with the concepts' identifiers."""
    return tuple(personalization.composition.token_ids(tokenizer, prompts) for tokenizer in pipeline.tokenizers)


def condition_tokens(
    pipeline: Pipeline, token_ids: Sequence[Int[np.ndarray, "B Q"]], personalization: Personalization
) -> Context:
    """Encodes the tokens of each text encoder, as `condition` does."""
    those = personalization.composition
    masks = tuple(map(those.token_mask, pipeline.tokenizers, token_ids))
    touched = np.any([mask.any((1, 2)) for mask in masks], axis=0)
    tokens = tuple(map(Tokens, token_ids, masks))
    run = partial(encode_prompts, pipeline.params["text"], tokens, networks=pipeline.networks)
    # Two compiled programs may round differently, so prompts that no concept enters go through the base model's own
    # program: they are promised to give its images bit for bit (docs/method.md).
    if not touched.any():
        return run({}, 0.0, method=BaseModel())
    moved = run(those.learned, personalization.strength, method=those.method)
    if touched.all():
        return moved
    base = run({}, 0.0, method=BaseModel())
    return jax.tree.map(lambda x, y: jnp.where(touched.reshape(-1, *[1] * (x.ndim - 1)), x, y), moved, base)


def with_unet(pipeline: Pipeline, personalization: Personalization) -> Pipeline:
    """Returns the pipeline with the concepts' UNet, if their method changes it."""
    those = personalization.composition
    if not those.method.changes_unet:
        return pipeline
    unet = those.method.unet(those.learned, pipeline.params["unet"], personalization.strength)
    return replace(pipeline, params=pipeline.params | {"unet": unet})


def context(pipeline: Pipeline, prompts: Sequence[str], personalization: Personalization = BASE_MODEL) -> Context:
    """Returns the UNet's conditioning on prompts, float32, on the host."""
    # One prompt at a time, so that one compiled program serves any number of prompts.
    parts = [condition(pipeline, [prompt], personalization) for prompt in prompts]
    return jax.tree.map(lambda *x: np.concatenate(x).astype(np.float32), *parts)


def movement(pipeline: Pipeline, prompts: Sequence[str], personalization: Personalization) -> Iterator[str]:
    """Yields a line per prompt: the relative L2 change of its text states, and the token where it is largest.

    The change is against the base model, whose prompt has the concept's identifier too, if the concept has one.
    """
    those = personalization.composition
    unet = "; the UNet is another one" if those.method.changes_unet else ""
    for prompt in prompts:
        given = token_ids_of(pipeline, [prompt], personalization)
        base, moved = (
            np.asarray(condition_tokens(pipeline, given, concepts).states[0], np.float32)
            for concepts in (BASE_MODEL, personalization)
        )
        steps = np.linalg.norm(moved - base, axis=-1)
        if not steps.any():
            yield f"{prompt!r}: nothing moved{unet}"
            continue
        most = int(steps.argmax())
        token = pipeline.tokenizer.token(int(given[0][0, most]))
        change = np.linalg.norm(moved - base) / np.linalg.norm(base)
        yield f"{prompt!r}: moved by {change:.2%}, the most at token {most}, {token!r}{unet}"
