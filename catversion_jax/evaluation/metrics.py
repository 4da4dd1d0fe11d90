"""Scores of images, from their embeddings alone: raw cosines, neither scaled nor clipped.

Embeddings are unit vectors in rows: of generated images (G), reference images (R) and prompts, all in one space.
"""

from collections.abc import Callable

import numpy as np

from catversion_jax.utils.types import Float

RESAMPLES = 9999
LEVEL = 0.95
BLOCK = 2**18
"""Numbers that are resampled at once, about."""

Number = float | np.floating


def normalize(x: Float[np.ndarray, "N e"]) -> Float[np.ndarray, "N e"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clip_t(generated: Float[np.ndarray, "G e"], prompts: Float[np.ndarray, "G e"]) -> Float[np.ndarray, "G"]:
    """Returns each image's cosine with its own prompt."""
    return np.einsum("ge,ge->g", generated, prompts)


def clip_i(generated: Float[np.ndarray, "G e"], references: Float[np.ndarray, "R e"]) -> Float[np.ndarray, "G"]:
    """Returns each image's mean cosine with the references; the mean over the images is that over all pairs.

    On the embeddings of masked images it is the masked CLIP-I, on DINO's embeddings the DINO score.
    """
    return (generated @ references.T).mean(axis=1)


def overall(
    clip_t: Float[np.ndarray, "..."] | Number, clip_i: Float[np.ndarray, "..."] | Number
) -> Float[np.ndarray, "..."] | Number:
    """Returns the paper's overall score, sqrt(CLIP-T x CLIP-I); NaN if one of them is negative."""
    return np.sqrt(np.where((clip_t < 0) | (clip_i < 0), np.nan, clip_t * clip_i))


def drift(base: Float[np.ndarray, "G e"], moved: Float[np.ndarray, "G e"]) -> Float[np.ndarray, "G"]:
    """Returns 1 - cosine of each image and the base model's image of the same prompt and seed."""
    # Of unit vectors, |a - b|^2 / 2 is 1 - cosine; written so, an image that did not change gives exactly 0.
    return np.square(base - moved).sum(axis=1) / 2


def relative_change(base: Float[np.ndarray, "..."], moved: Float[np.ndarray, "..."]) -> float:
    """Returns the L2 norm of the change in text states, divided by that of the base model's states."""
    return float(np.linalg.norm(moved - base) / np.linalg.norm(base))


def diversity(generated: Float[np.ndarray, "G e"]) -> float | None:
    """Returns the mean of 1 - cosine over all pairs of images of one prompt; None if there is no pair."""
    count = len(generated)
    if count < 2:
        return None
    # The cosines of all ordered pairs of different unit vectors sum to |sum|^2 - count.
    return float(1 - (np.square(generated.sum(axis=0)).sum() - count) / (count * (count - 1)))


def nearest_caption(images: Float[np.ndarray, "G e"], captions: Float[np.ndarray, "N e"]) -> np.ndarray:
    """Returns the index of each image's nearest caption."""
    return np.argmax(images @ captions.T, axis=1)


def interval(statistic: Callable[..., np.ndarray], *samples: Float[np.ndarray, "N"]) -> tuple[float, float] | None:
    """Returns the bootstrap percentile interval, at LEVEL, of a statistic of the samples' means.

    The samples are resampled together, row by row. None if there are fewer than two rows or the statistic is NaN.
    """
    rows = len(samples[0])
    if rows < 2:
        return None
    rng = np.random.default_rng(0)
    # In blocks, which draw the same numbers as all at once: those of thousands of rows would take gigabytes.
    block = max(1, BLOCK // rows)
    means = np.empty((len(samples), RESAMPLES))
    for start in range(0, RESAMPLES, block):
        index = rng.integers(0, rows, (min(block, RESAMPLES - start), rows))
        means[:, start : start + block] = [sample[index].mean(axis=1) for sample in samples]
    values = statistic(*means)
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return None if np.isnan(low) else (float(low), float(high))
