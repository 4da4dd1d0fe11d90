"""Prompts to what the UNet is conditioned on, and how far a concept moves that: no picture is drawn."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.methods.composition import BASE_MODEL, Personalization
from catversion_jax.models.unet import Context
from catversion_jax.sampling import sampler


def context(pipeline: Pipeline, prompts: Sequence[str], personalization: Personalization = BASE_MODEL) -> Context:
    """What the UNet is conditioned on, float32, on the host."""
    # One prompt at a time: one program, however many prompts.
    parts = [sampler.condition(pipeline, [prompt], personalization) for prompt in prompts]
    return jax.tree.map(lambda *x: np.concatenate(x).astype(np.float32), *parts)


def movement(pipeline: Pipeline, prompts: Sequence[str], personalization: Personalization) -> Iterator[str]:
    """One line a prompt: the relative L2 change of its text states against the base model, and where it is largest.
    The base model is given the concept's identifier too, if it has one."""
    those = personalization.composition
    unet = "; the UNet is another one" if those.method.changes_unet else ""
    for prompt in prompts:
        given = those.prompt(prompt)
        base = context(pipeline, [given]).states[0]
        moved = context(pipeline, [prompt], personalization).states[0]
        steps = np.linalg.norm(moved - base, axis=-1)
        if not steps.any():
            yield f"{prompt!r}: nothing moved{unet}"
            continue
        most = int(steps.argmax())
        token = pipeline.tokenizer.token(pipeline.tokenizer([given])[0, most])
        change = np.linalg.norm(moved - base) / np.linalg.norm(base)
        yield f"{prompt!r}: moved by {change:.2%}, the most at token {most}, {token!r}{unet}"
