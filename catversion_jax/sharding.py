"""Which mesh axis each logical axis is split over: the one file that knows."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("concept", "data")

RULES = {
    "concept": "concept",  # the leading axis of state and data: independent concepts
    "batch": AXES,  # concepts x batch, flattened: what the UNet sees
    "frozen": None,  # the base model: whole on every device
}
"""logical axis -> mesh axes, None = not split."""


def make_mesh(concepts: int, batch_size: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over as many devices as divide the work evenly: first the concepts, then each concept's batch."""
    devices = jax.devices() if devices is None else devices
    concept = math.gcd(concepts, len(devices))
    data = math.gcd(batch_size, len(devices) // concept)
    return Mesh(np.asarray(devices[: concept * data]).reshape(concept, data), AXES)


def sharding(mesh: Mesh, logical: str) -> NamedSharding:
    """Split the first array axis as RULES say for the logical axis."""
    return NamedSharding(mesh, PartitionSpec(RULES[logical]))
