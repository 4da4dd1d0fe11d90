"""A fixed number of concepts on the devices, trained by one compiled step: the shapes never change, the concepts do."""

from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh

from catversion_jax.models.sharding import sharding
from catversion_jax.training.state import ConceptData, Frozen, TrainState
from catversion_jax.training.step import StepConfig, compile_chunk, compile_evaluate, finished
from catversion_jax.utils.types import Bool, Float


@cache
def compile_put(mesh: Mesh):
    """`put(slots, one, index)`: a concept into a slot, in place."""

    def put(slots, one, index):
        return jax.tree.map(lambda all, x: jax.lax.dynamic_update_slice_in_dim(all, x, index, 0), slots, one)

    return jax.jit(put, out_shardings=sharding(mesh, "concept"), donate_argnums=0)


class Slots:
    """Stacked states and data. An empty slot is one whose concept has no steps to take.

    `host` is a copy of the state; `steps`, `finished`, `broken` and `losses` are of each slot. A broken one's loss or
    gradient was not finite: it stays at its last good state.
    """

    def __init__(self, config: StepConfig, frozen: Frozen, state: TrainState, like: ConceptData, length: int):
        """`state` has a concept for each slot; `like` is some concept's data, [1, ...]; `length`: steps a dispatch."""
        self._config, self._frozen, self._length = config, frozen, length
        count, on_concepts = len(state.step), sharding(config.mesh, "concept")
        empty = jax.tree.map(lambda x: np.zeros((count, *x.shape[1:]), x.dtype), like)
        self._state, self._data = jax.device_put(state, on_concepts), jax.device_put(empty, on_concepts)
        self.host = to_host(state)
        self.steps = np.zeros(count, np.int32)
        self.finished: Bool[np.ndarray, "C"] = np.ones(count, bool)
        self.broken: Bool[np.ndarray, "C"] = np.zeros(count, bool)
        self.losses: Float[np.ndarray, "C"] = np.zeros(count, np.float32)

    def put(self, index: int, state: TrainState, data: ConceptData) -> None:
        """Begin, or go on with, a concept [1, ...] in a slot."""
        put = compile_put(self._config.mesh)
        self._state, self._data = put(self._state, state, index), put(self._data, data, index)
        jax.tree.map(lambda all, x: all.__setitem__(index, x[0]), self.host, jax.device_get(state))
        self.steps[index] = data.steps[0]
        self.finished = finished(self.host, self.steps, self._config.stop)

    def clear(self, index: int) -> None:
        """Let a slot rest that is not finished: what is in it has no more steps to take."""
        self.steps[index] = 0
        self.finished[index] = True

    def one(self, index: int) -> TrainState:
        """A slot's state, [1, ...], on the host."""
        return jax.tree.map(lambda x: x[index : index + 1], self.host)

    def advance(self) -> None:
        """One dispatch, and an evaluation where a concept is due."""
        config, before, was_finished = self._config, self.host.step, self.finished
        step = compile_chunk(config, self._length)
        self._state, metrics = step(self._state, self._frozen, self._data)
        every = config.stop.every
        if every and np.any(~was_finished & ((before + self._length) % every == 0)):
            self._state, _ = compile_evaluate(config)(self._state, self._frozen, self._data)
        self.host, self.losses = to_host(self._state), np.asarray(metrics["loss"])[-1]
        expected = np.minimum(before + self._length, self.steps)
        self.broken = ~was_finished & (self.host.step < expected)
        self.finished = finished(self.host, self.steps, config.stop)


def to_host(state: TrainState) -> TrainState:
    """A copy in arrays that can be written to."""
    return jax.tree.map(np.array, jax.device_get(state))
