"""Scores of images, of their embeddings alone: raw cosines, neither scaled nor clipped.

Embeddings are unit vectors, in rows: of generated images (G), reference images (R) and prompts, all of one space.
"""

from collections.abc import Callable

import numpy as np

from catversion_jax.utils.types import Float

RESAMPLES = 9999
LEVEL = 0.95


def normalize(x: Float[np.ndarray, "N e"]) -> Float[np.ndarray, "N e"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clip_t(generated: Float[np.ndarray, "G e"], prompts: Float[np.ndarray, "G e"]) -> Float[np.ndarray, "G"]:
    """Each image's cosine with its own prompt."""
    return np.einsum("ge,ge->g", generated, prompts)


def clip_i(generated: Float[np.ndarray, "G e"], references: Float[np.ndarray, "R e"]) -> Float[np.ndarray, "G"]:
    """Each image's mean cosine with the references; the mean of these is that over all pairs. With the embeddings
    of masked images it is the masked CLIP-I, with DINO's it is DINO."""
    return (generated @ references.T).mean(axis=1)


def overall(clip_t: Float[np.ndarray, "..."], clip_i: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The paper's score of both: sqrt(CLIP-T x CLIP-I); not a number where one of them is negative."""
    return np.sqrt(np.where((clip_t < 0) | (clip_i < 0), np.nan, clip_t * clip_i))


def drift(base: Float[np.ndarray, "G e"], moved: Float[np.ndarray, "G e"]) -> Float[np.ndarray, "G"]:
    """How far each image is from the base model's of the same prompt and seed: 1 - cosine, written so that what did
    not move gives exactly 0."""
    return np.square(base - moved).sum(axis=1) / 2


def relative_change(base: Float[np.ndarray, "..."], moved: Float[np.ndarray, "..."]) -> float:
    """The L2 norm of what changed in text states, over that of the base model's."""
    return float(np.linalg.norm(moved - base) / np.linalg.norm(base))


def diversity(generated: Float[np.ndarray, "G e"]) -> float | None:
    """The mean of 1 - cosine over all pairs of images of one prompt; None where there is no pair."""
    count = len(generated)
    if count < 2:
        return None
    # Of unit vectors, the sum over all ordered pairs of different ones is |sum|^2 - count.
    return float(1 - (np.square(generated.sum(axis=0)).sum() - count) / (count * (count - 1)))


def nearest(images: Float[np.ndarray, "G e"], captions: Float[np.ndarray, "N e"]) -> np.ndarray:
    """The index of each image's nearest caption."""
    return np.argmax(images @ captions.T, axis=1)


def interval(statistic: Callable[..., np.ndarray], *samples: Float[np.ndarray, "N"]) -> tuple[float, float] | None:
    """The bootstrap percentile interval, LEVEL of the resamples, of a statistic of the samples' means; the samples are
    resampled together, row by row. None where there are fewer than two rows, or where the statistic has no value."""
    rows = len(samples[0])
    if rows < 2:
        return None
    index = np.random.default_rng(0).integers(0, rows, (RESAMPLES, rows))
    values = statistic(*(sample[index].mean(axis=1) for sample in samples))
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return None if np.isnan(low) else (float(low), float(high))
