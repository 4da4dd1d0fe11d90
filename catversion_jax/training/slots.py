"""A fixed number of slots for concepts on the devices, trained by one compiled step."""

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
    """Returns the jitted `put(slots, one, index)`, which writes a concept into a slot in place."""

    def put(slots, one, index):
        return jax.tree.map(lambda all, x: jax.lax.dynamic_update_slice_in_dim(all, x, index, 0), slots, one)

    # Donated, so that XLA overwrites one slot instead of copying all of them.
    return jax.jit(put, out_shardings=sharding(mesh, "concept"), donate_argnums=0)


class Slots:
    """The states and data of the concepts in the slots, stacked. The concept of an empty slot has no steps to take.

    `host` is a copy of the state; `steps`, `finished`, `broken` and `losses` have a value for each slot. A slot is
    broken if its loss or gradient was not finite; it stays at its last good state.
    """

    def __init__(self, config: StepConfig, frozen: Frozen, state: TrainState, like: ConceptData, length: int):
        """Sets up empty slots; a dispatch takes `length` steps.

        `state` has one concept for each slot; `like` is the data of any concept, [1, ...], for its shapes.
        """
        self._config, self._frozen, self._length = config, frozen, length
        count, on_concepts = len(state.step), sharding(config.mesh, "concept")
        # The arrays keep these shapes: the step is compiled for them once, which takes seconds to minutes, and concepts
        # come and go by overwriting a slot. An empty slot takes part in every step, which leaves it as it is.
        empty = jax.tree.map(lambda x: np.zeros((count, *x.shape[1:]), x.dtype), like)
        self._state, self._data = jax.device_put(state, on_concepts), jax.device_put(empty, on_concepts)
        self.host = to_host(state)
        self.steps = np.zeros(count, np.int32)
        self.finished: Bool[np.ndarray, "C"] = np.ones(count, bool)
        self.broken: Bool[np.ndarray, "C"] = np.zeros(count, bool)
        self.losses: Float[np.ndarray, "C"] = np.zeros(count, np.float32)

    def put(self, index: int, state: TrainState, data: ConceptData) -> None:
        """Puts a concept [1, ...], new or resumed, into a slot."""
        put = compile_put(self._config.mesh)
        self._state, self._data = put(self._state, state, index), put(self._data, data, index)
        jax.tree.map(lambda all, x: all.__setitem__(index, x[0]), self.host, jax.device_get(state))
        self.steps[index] = data.steps[0]
        self.finished = np.asarray(finished(self.host, self.steps, self._config.stop))

    def clear(self, index: int) -> None:
        """Empties a slot: nothing of its concept is left, neither here nor on the devices."""
        blank = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), (self._state, self._data))
        self.put(index, *blank)

    def one(self, index: int) -> TrainState:
        """Returns a copy of a slot's state, [1, ...], on the host: the next concept overwrites the slot."""
        return jax.tree.map(lambda x: x[index : index + 1].copy(), self.host)

    def compile(self) -> None:
        """Compiles what `advance` runs, so that its first call takes no longer than the others."""
        arguments = self._state, self._frozen, self._data
        compile_chunk(self._config, self._length).lower(*arguments).compile()
        if self._config.stop.every:
            compile_evaluate(self._config).lower(*arguments).compile()

    def advance(self) -> None:
        """Runs one dispatch, and an evaluation if it is due for a concept."""
        config, before, was_finished = self._config, self.host.step, self.finished
        step = compile_chunk(config, self._length)
        self._state, metrics = step(self._state, self._frozen, self._data)
        every = config.stop.every
        if every and np.any(~was_finished & ((before + self._length) % every == 0)):
            self._state, _ = compile_evaluate(config)(self._state, self._frozen, self._data)
        self.host, self.losses = to_host(self._state), np.asarray(metrics["loss"])[-1]
        # The step counter of a concept whose loss or gradient is not finite does not advance.
        expected = np.minimum(before + self._length, self.steps)
        self.broken = ~was_finished & (self.host.step < expected)
        self.finished = np.asarray(finished(self.host, self.steps, config.stop))


def to_host(state: TrainState) -> TrainState:
    """Returns a copy of the state in writable numpy arrays."""
    return jax.tree.map(np.array, jax.device_get(state))
