"""A server: it prepares the concepts itself, and keeps what the workers learn, who share no folder with it."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from catversion_jax.config import Config
from catversion_jax.fleet.cluster import import_ray
from catversion_jax.fleet.home import Handed, Report
from catversion_jax.fleet.work_queue import Task
from catversion_jax.training.checkpoints import Checkpoints, Saved
from catversion_jax.training.engine import ConceptJob, Ended, Engine
from catversion_jax.training.interrupted import InterruptedConcept, of_slots
from catversion_jax.training.state import ConceptData, TrainState
from catversion_jax.training.status import ConceptStatus
from catversion_jax.training.turn import Turn, take_turn
from catversion_jax.utils.errors import ReportedError


class Given(NamedTuple):
    """What a worker is given of a concept."""

    data: Any  # Ray's reference to its ConceptData, which Ray moves to a disk where memory is short
    saved: InterruptedConcept | None


class SentStates:
    """Checkpoints that are sent to the driver."""

    latest = None

    def __init__(self) -> None:
        self.saved: Saved | None = None

    def save(self, step: int, state: TrainState, note: Mapping[str, Any]) -> None:
        # The engine overwrites a slot in place when a concept enters it.
        self.saved = Saved(step, jax.tree.map(np.copy, state), dict(note))

    def restore(self, like: TrainState) -> TrainState | None:
        return None

    def close(self) -> None:
        pass


class ServerHome:
    """A worker's side, as fleet/home.py has it."""

    def open(self, worker: str, config: Config) -> Checkpoints:
        self.checkpoints = SentStates()
        return self.checkpoints

    def warm_up(self, engine: Engine) -> None:
        """Compiles nothing: the server draws."""

    def prepare(self, engine: Engine, handed: Handed) -> tuple[ConceptData, InterruptedConcept | ReportedError | None]:
        given: Given = handed.given
        return import_ray().get(given.data), given.saved

    def take_turn(self, engine: Engine) -> Turn:
        return take_turn(engine, engine.config.sample.every)

    def end(self, ended: Ended) -> Ended:
        return ended

    def saved(self) -> Saved | None:
        sent, self.checkpoints.saved = self.checkpoints.saved, None
        return sent


class ServerDesk:
    """The driver's side, as fleet/home.py has it. What it takes in waits in `reports` for the server."""

    def __init__(self, ray: Any, saved: Mapping[str, InterruptedConcept]):
        """`saved` are the states that concepts go on from, by id."""
        self.ray, self._saved = ray, dict(saved)
        self._data: dict[str, Any] = {}  # Ray's references, by id
        self.reports: deque[Report] = deque()

    def accept(self, job: ConceptJob, data: ConceptData) -> None:
        """Keeps a concept's data until it has ended: whoever has it may be lost."""
        self._data[job.id] = self.ray.put(jax.device_get(data))

    def forget(self, ids: Iterable[str]) -> None:
        for concept_id in ids:
            self._data.pop(concept_id, None)
            self._saved.pop(concept_id, None)

    def check(self) -> None:
        """Does nothing: the server has the store for itself."""

    def given(self, task: Task[ConceptJob]) -> Given:
        return Given(self._data[task.job.id], self._saved.get(task.job.id))

    def take(self, report: Report) -> None:
        for concept_id, saved in of_slots(report.saved) if report.saved else ():
            if concept_id in self._data:  # it was not removed meanwhile
                self._saved[concept_id] = saved
        self.forget(ended.status.id for ended in report.turn.ended)
        self.reports.append(report)

    def written(self, jobs: Collection[ConceptJob]) -> list[ConceptStatus]:
        return []

    def fail(self, status: ConceptStatus) -> None:
        self.take(Report(Turn((Ended(status, None),))))
