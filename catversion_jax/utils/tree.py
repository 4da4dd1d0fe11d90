"""Small functions of parameter trees."""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from catversion_jax.utils.types import Array, Float, Params


def count(params: Params) -> int:
    """How many numbers the tree holds (arrays or shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def digest(leaf: np.ndarray) -> bytes:
    """Names an array's shape and bytes; for a fingerprint they are those of float16, so that the float16 and the
    float32 file of one model agree."""
    return hashlib.sha256(f"{leaf.shape}".encode() + leaf.tobytes()).digest()


def fingerprint(digests: Mapping[str, bytes]) -> str:
    """16 hex digits that name a tree of which each path's `digest` is given, in whatever order it was read."""
    return hashlib.sha256(b"".join(path.encode() + value for path, value in sorted(digests.items()))).hexdigest()[:16]


def add(params: Params, change: Params, scale: Float[Array, ""] | float) -> Params:
    """`params`, in their own dtypes, with `scale` times a change to some of them."""
    if not isinstance(params, Mapping):
        return (params + scale * change).astype(params.dtype)
    return {name: add(x, change[name], scale) if name in change else x for name, x in params.items()}
