"""Runs any number of rows through one compiled program: in batches of one size, the last padded with its last row."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np

ItemT = TypeVar("ItemT")

BATCH = 8
"""Rows per call of a network."""


def padded_batches(rows: int) -> Iterator[np.ndarray]:
    """The row indices of each batch."""
    index = np.minimum(np.arange(-(-rows // BATCH) * BATCH), rows - 1)
    return iter(np.split(index, len(index) // BATCH))


def in_batches(function: Callable, *arrays: np.ndarray) -> np.ndarray:
    """Applies `function` to BATCH rows of the arrays at a time and concatenates the results."""
    rows = len(arrays[0])
    parts = [function(*(array[i] for array in arrays)) for i in padded_batches(rows)]
    return np.concatenate(parts)[:rows]


def groups(items: Iterable[ItemT]) -> Iterator[list[ItemT]]:
    """Yields BATCH items at a time, the last group shorter if need be."""
    rest = iter(items)
    return iter(lambda: list(islice(rest, BATCH)), [])


def streamed(function: Callable, rows: Iterable[np.ndarray]) -> np.ndarray:
    """Returns what `in_batches` does for rows that come one by one, of which only a batch is held."""
    parts = []
    for group in groups(rows):
        padded = np.stack(group + group[-1:] * (BATCH - len(group)))
        parts.append(np.asarray(function(padded))[: len(group)])
    return np.concatenate(parts)
