"""Prompts to what the UNet is conditioned on, and how far a concept moves that: no picture is drawn."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from catversion_jax import sampling
from catversion_jax.artifact import Concept
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
    """One line a prompt: the relative L2 change of its text states against the base model, and where it is largest."""
    for prompt in prompts:
        base, moved = (context(pipeline, [prompt], concepts, s).states[0] for s in (0.0, strength))
        steps = np.linalg.norm(moved - base, axis=-1)
        if not steps.any():
            yield f"{prompt!r}: nothing moved"
            continue
        most = int(steps.argmax())
        token = pipeline.tokenizer.token(pipeline.tokenizer([prompt])[0, most])
        change = np.linalg.norm(moved - base) / np.linalg.norm(base)
        yield f"{prompt!r}: moved by {change:.2%}, the most at token {most}, {token!r}"
