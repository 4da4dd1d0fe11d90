"""The step on meshes of eight fake CPU devices: eight_devices.py MODEL OUT.npz; a process of its own, for the flag."""

import os
import re
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from catversion_jax.base import pipeline
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.models.sharding import FROZEN, make_mesh, sharding
from catversion_jax.training import step as ts
from catversion_jax.training.state import Frozen
from tests.training.test_step import concept, stack

BATCH, STEPS = 4, 2
MESHES = {
    "one": lambda concepts: make_mesh(concepts, BATCH, devices=jax.devices()[:1]),
    "whole": lambda concepts: make_mesh(concepts, BATCH),
    "fsdp": lambda concepts: make_mesh(concepts, BATCH, fsdp=4),
    "tensor": lambda concepts: make_mesh(concepts, BATCH, tensor=2),
}
CASES = (("one", 2), ("whole", 8), ("whole", 2), ("fsdp", 2), ("tensor", 2))
"""Of MESHES, and how many concepts."""

COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def run(model: str, name: str, concepts: int) -> dict[str, np.ndarray]:
    """Losses, prefixes, the mesh's shape, the names of the collectives and how much of the UNet a device holds."""
    mesh = MESHES[name](concepts)
    pipe = pipeline.load_pipeline(pipeline.ModelConfig(model), mesh, FROZEN)
    method = CatVersion(((1, 2, 3),), length=2, init_std=0.1)
    config = ts.StepConfig(pipe.networks, method, ts.OptimizerConfig(), BATCH, mesh)
    place = sharding(mesh, "concept")
    state = config.init_state(list(range(concepts)))
    data = stack(*(concept(3 + i, seed=i, size=16) for i in range(concepts)))
    state, data = jax.device_put(state, place), jax.device_put(data, place)
    frozen = Frozen.of(pipe, mesh, FROZEN, method)
    step = ts.compile_chunk(config, 1).lower(state, frozen, data).compile()
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, data)
        losses.append(np.asarray(metrics["loss"][0]))
    leaves = jax.tree.leaves(pipe.params["unet"])
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)
    return {
        "losses": np.stack(losses),
        "prefix": np.asarray(state.learned["prefix"]),
        "mesh": np.asarray(list(mesh.shape.values())),
        "collectives": np.asarray(sorted(set(COLLECTIVE.findall(step.as_text())))),
        "held": np.float32(held),
    }


if __name__ == "__main__":
    results = {case: run(sys.argv[1], *case) for case in CASES}
    np.savez(sys.argv[2], **{f"{name}{n} {key}": v for (name, n), of in results.items() for key, v in of.items()})
