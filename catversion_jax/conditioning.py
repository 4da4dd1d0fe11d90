"""Prompts to what the UNet is conditioned on, and how far a concept moves that: no picture is drawn."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from catversion_jax import sampling
from catversion_jax.artifact import Concept
from catversion_jax.ensemble import ensemble
from catversion_jax.models.unet import Context
from catversion_jax.pipeline import Pipeline


def context(
    pipeline: Pipeline, prompts: Sequence[str], concepts: Sequence[Concept] = (), strength: float = 1.0
) -> Context:
    """What the UNet is conditioned on with concepts; without one, in the base model. Float32, on the host."""
    # One prompt at a time: one program, however many prompts.
    parts = [sampling.condition(pipeline, [prompt], concepts, strength) for prompt in prompts]
    return jax.tree.map(lambda *x: np.concatenate(x).astype(np.float32), *parts)


def movement(pipeline: Pipeline, prompts: Sequence[str], concepts: Sequence[Concept], strength: float) -> Iterator[str]:
    """One line a prompt: the relative L2 change of its text states against the base model, and where it is largest.
    The base model is given the concept's identifier too, where it has one."""
    those = ensemble(concepts if strength else ())
    unet = "; the UNet is another one" if those.method.changes_unet else ""
    for prompt in prompts:
        given = those.prompt(prompt)
        base = context(pipeline, [given]).states[0]
        moved = context(pipeline, [prompt], concepts, strength).states[0]
        steps = np.linalg.norm(moved - base, axis=-1)
        if not steps.any():
            yield f"{prompt!r}: nothing moved{unet}"
            continue
        most = int(steps.argmax())
        token = pipeline.tokenizer.token(pipeline.tokenizer([given])[0, most])
        change = np.linalg.norm(moved - base) / np.linalg.norm(base)
        yield f"{prompt!r}: moved by {change:.2%}, the most at token {most}, {token!r}{unet}"
