"""Small functions on parameter trees."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from catversion_jax.utils.types import Array, Float, Params


def count_numbers(params: Params) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def digest(leaf: np.ndarray) -> bytes:
    """Hashes an array's shape and bytes.

    A fingerprint is made of digests in float16, so that the float16 and the float32 file of one model agree.
    """
    return hashlib.sha256(f"{leaf.shape}".encode() + leaf.tobytes()).digest()


def fingerprint(digests: Mapping[str, bytes]) -> str:
    """Hashes a tree, given the `digest` of each path in any order, to 16 hexadecimal digits."""
    return hashlib.sha256(b"".join(path.encode() + value for path, value in sorted(digests.items()))).hexdigest()[:16]


def add(params: Any, change: Any, scale: Float[Array, ""] | float) -> Any:
    """Adds `scale` times `change`, which may cover only some of the parameters; dtypes stay those of `params`."""
    if not isinstance(params, dict):
        return (params + scale * change).astype(params.dtype)
    return {name: add(x, change[name], scale) if name in change else x for name, x in params.items()}
