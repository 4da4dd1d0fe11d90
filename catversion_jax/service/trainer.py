"""Who trains the concepts of a service: the slots of this process, or others."""

from collections.abc import Collection
from typing import Protocol

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.service.states import States
from catversion_jax.training.checkpoints import HeldCheckpoint
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob, Engine
from catversion_jax.training.interrupted import InterruptedConcept, of_slots
from catversion_jax.training.state import ConceptData
from catversion_jax.training.turn import Turn, take_turn


class Trainer(Protocol):
    """Trains concepts, and saves their states. One thread calls it."""

    @property
    def slots(self) -> int:
        """How many concepts train at once."""

    @property
    def entered(self) -> int:
        """How many concepts are in training."""

    @property
    def free(self) -> int:
        """How many concepts may enter now."""

    @property
    def is_busy(self) -> bool:
        """Whether `train` has something to do."""

    def compile(self) -> None:
        """Compiles the step, where that is this process's."""

    def enter(self, job: ConceptJob, data: ConceptData) -> None:
        """Takes a concept, which goes on from its state if that was saved; one has to be `free`."""

    def train(self) -> Turn:
        """Trains for a moment; returns what came of it. Raises TrainingEndedError if nobody does any more."""

    def save_if_due(self) -> None:
        """Saves the states from time to time; what has ended must have been written before."""

    def remove(self, ids: Collection[str]) -> None:
        """Removes concepts, and what was saved of them."""

    def stop(self) -> Turn:
        """Stops training; returns what has come of it meanwhile."""

    def close(self) -> None:
        """Saves the states, and waits for that. It has to be stopped before."""


class TrainingEndedError(Exception):
    """Nobody trains any more; the cause says why."""


class LocalTrainer:
    """The engine of this process, as a Trainer."""

    def __init__(
        self, config: Config, pipeline: BasePipeline, room: Room, states: States, saved: dict[str, InterruptedConcept]
    ):
        """Sets the engine up; concepts in `saved` go on from their states."""
        self.config, self.states = config, states
        self._held = HeldCheckpoint()
        self.engine = Engine(config, pipeline, room, self._held, saved)
        self._is_due = False

    @property
    def slots(self) -> int:
        return self.config.batch.slots

    @property
    def entered(self) -> int:
        return len(self.engine.entered)

    @property
    def free(self) -> int:
        return self.engine.free

    @property
    def is_busy(self) -> bool:
        return self.engine.busy

    def compile(self) -> None:
        self.engine.slots.compile()

    def enter(self, job: ConceptJob, data: ConceptData) -> None:
        self.engine.enter(job, data)

    def train(self) -> Turn:
        return take_turn(self.engine, self.config.sample.every)

    def save_if_due(self) -> None:
        # Until it was saved, whatever comes between.
        self._is_due = self._is_due or self.engine.is_due
        if self._is_due:
            self.states.save(self.now())
            self._is_due = False

    def now(self) -> dict[str, InterruptedConcept]:
        """Returns the states of the concepts in the slots, and of those that have not gone on from theirs yet."""
        self.engine.save()
        held = self._held.take()
        return self.engine.saved | (dict(of_slots(held)) if held else {})

    def remove(self, ids: Collection[str]) -> None:
        for concept_id in ids:
            self.engine.remove(concept_id)
        self.states.replace(self.now())

    def stop(self) -> Turn:
        return Turn()

    def close(self) -> None:
        self.states.save(self.now())
        self.states.close()
