"""Which mesh axis each logical axis is split over: the one file that knows."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from catversion_jax.types import Params

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


def frozen(shapes: Params, dtype, mesh: Mesh | None = None) -> Params:
    """Shapes of a base model's parameters in `dtype` as they lie on the mesh, or on the default device."""
    place = SingleDeviceSharding(jax.devices()[0]) if mesh is None else sharding(mesh, "frozen")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place), shapes)
