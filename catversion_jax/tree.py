"""Small functions of parameter trees."""

import hashlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from catversion_jax.types import Params


def cast(params: Params, dtype) -> Params:
    """Every leaf in one dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def count(params: Params) -> int:
    """How many numbers the tree holds (arrays or shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def fingerprint(params: Params) -> str:
    """16 hex digits that name the values of a tree, whatever dtype they are stored in.

    The values are compared in float16, so that the float16 and the float32 file of one model agree.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float16).tobytes())
    return digest.hexdigest()[:16]
