"""The attention kernels that this machine takes, against attention in float32: values and gradients."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import DTYPES
from catversion_jax.models.attention import XLA, choose
from catversion_jax.utils import markdown
from catversion_jax.utils.compiler import jit
from catversion_jax.utils.types import Array, Float

IMAGES, HEADS = 2, 8
SHAPES = ((4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40), (1024, 77, 80), (256, 77, 160))
"""Queries, keys and channels of a head in Stable Diffusion 1.5's UNet at 512 px: to themselves, and to a prompt."""

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""The largest error of a kernel, in parts of the largest value: some of the dtype's roundings."""


@dataclass(frozen=True)
class Parity:
    """A kernel at one shape. Errors are the largest, in parts of the largest value of the reference."""

    shape: tuple[int, int, int]  # one of SHAPES
    kernel: str
    value: float
    gradient: float  # the largest of the query's, the key's and the value's
    tolerance: float

    @property
    def agrees(self) -> bool:
        # Each by itself: Python's max may pass over NaN.
        return self.value <= self.tolerance and self.gradient <= self.tolerance


def compare_kernels(dtype: str) -> list[Parity]:
    """Runs the kernel of each of SHAPES on random numbers of a dtype."""
    return [compare(shape, dtype) for shape in SHAPES]


def compare(shape: tuple[int, int, int], dtype: str) -> Parity:
    queries, keys, channels = shape
    of = [
        (IMAGES, queries, HEADS, channels),
        *[(IMAGES, keys, HEADS, channels)] * 2,
        (IMAGES, queries, HEADS, channels),
    ]
    drawn = [jax.random.normal(jax.random.key(i), each, DTYPES[dtype]) for i, each in enumerate(of)]
    kernel = choose(drawn[0].shape, drawn[1].shape, drawn[0].dtype)
    found = value_and_gradients(kernel.run, *drawn)
    with jax.default_matmul_precision("highest"):
        expected = value_and_gradients(XLA.run, *(x.astype(jnp.float32) for x in drawn))
    value, *gradients = (error(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    return Parity(shape, kernel.run.__name__, value, float(np.max(gradients)), TOLERANCES[dtype])


def value_and_gradients(attend, query: Array, key: Array, value: Array, outer: Array) -> list[Array]:
    """Returns what attention gives, and its gradients by query, key and value for a gradient of the result."""

    @jit
    def run(query, key, value, outer):
        result, back = jax.vjp(attend, query, key, value)
        return [result, *back(outer)]

    return run(query, key, value, outer)


def error(found: Float[Array, "*shape"], expected: Float[Array, "*shape"]) -> float:
    apart, largest = np.abs(np.asarray(found, np.float32) - expected).max(), np.abs(expected).max()
    return float(apart / largest)


COLUMNS = {
    "queries x keys x channels": lambda row: " x ".join(map(str, row.shape)),
    "kernel": lambda row: row.kernel,
    "error": lambda row: f"{row.value:.1e}",
    "of the gradients": lambda row: f"{row.gradient:.1e}",
    "at most": lambda row: f"{row.tolerance:.0e}",
}


def parity_table(rows: list[Parity]) -> str:
    """Returns the rows as a Markdown table."""
    return markdown.table(list(COLUMNS), ([cell(row) for cell in COLUMNS.values()] for row in rows))
