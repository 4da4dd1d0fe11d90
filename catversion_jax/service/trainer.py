"""Who trains the concepts of a service: the slots of this process, or others."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.training.checkpoints import open_checkpoints
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob, Engine
from catversion_jax.training.interrupted import read_interrupted
from catversion_jax.training.state import ConceptData
from catversion_jax.training.step import StepConfig
from catversion_jax.training.turn import Turn, take_turn


class Trainer(Protocol):
    """Trains concepts, and keeps their states in a folder of checkpoints. One thread calls it."""

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
        """Trains for a moment; returns what came of it."""

    def save_if_due(self) -> None:
        """Saves the states from time to time; what has ended must have been written before."""

    def remove(self, ids: Collection[str]) -> None:
        """Removes concepts, and the checkpoints, which may hold what they learned; the others' are saved anew."""

    def stop(self) -> Turn:
        """Stops training; returns what has come of it meanwhile."""

    def close(self) -> None:
        """Saves the states, and waits for that. It has to be stopped before."""


class LocalTrainer:
    """The engine of this process, as a Trainer."""

    def __init__(self, config: Config, pipeline: BasePipeline, room: Room, folder: Path):
        """Sets the engine up; concepts that were interrupted go on from what the folder holds."""
        self.config, self.folder = config, folder
        saved = read_interrupted([folder], StepConfig.of(config, pipeline.networks, config.batch.slots))
        self.engine = Engine(config, pipeline, room, self.opened_checkpoints(), saved)
        self._is_open = True  # whether the engine's checkpoints are
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
        with self.saving():
            if self._is_due and self.engine.busy:
                self.engine.save()
            else:
                self.engine.save_if_due()
        self._is_due = False

    def opened_checkpoints(self):
        return open_checkpoints(self.folder, self.config.checkpoint.keep, lambda: None)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """After a failure inside, which Orbax's manager does not outlive, the next save has a new one."""
        if not self._is_open:
            self.engine.checkpoints, self._is_open = self.opened_checkpoints(), True
        try:
            yield
        except Exception:
            self.close_checkpoints()
            raise

    def close_checkpoints(self) -> None:
        """Closes checkpoints whose last save failed, which was said already, or is not wanted any more."""
        self._is_open = False
        with suppress(Exception):
            self.engine.checkpoints.close()

    def remove(self, ids: Collection[str]) -> None:
        for concept_id in ids:
            self.engine.remove(concept_id)
        self.close_checkpoints()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._is_due = True

    def stop(self) -> Turn:
        return Turn()

    def close(self) -> None:
        with self.saving():
            if self.engine.busy:
                self.engine.save()
            self.engine.checkpoints.close()
