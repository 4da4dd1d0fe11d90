"""Runs any number of rows through one compiled program: in batches of one size, the last padded with its last row."""

from collections.abc import Callable, Iterator

import numpy as np

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
