"""A server: it prepares the concepts itself, and keeps what the workers learn, who share no folder with it."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from catversion_jax.config import Config
from catversion_jax.fleet.cluster import import_ray, last_line
from catversion_jax.fleet.home import Encoded, Handed, Prepared, Report
from catversion_jax.fleet.work_queue import Task
from catversion_jax.training.checkpoints import Checkpoints, HeldCheckpoint, Saved
from catversion_jax.training.engine import ConceptJob, Ended, Engine
from catversion_jax.training.interrupted import InterruptedConcept, of_slots
from catversion_jax.training.state import ConceptData
from catversion_jax.training.status import ConceptStatus
from catversion_jax.training.turn import Turn, take_turn
from catversion_jax.utils.errors import StorageError


class Given(NamedTuple):
    """What a worker is given of a concept."""

    data: Any  # Ray's reference to its ConceptData, which Ray moves to a disk where memory is short
    saved: InterruptedConcept | None


class ServerHome:
    """A worker's side, as fleet/home.py has it."""

    def open(self, worker: str, config: Config) -> Checkpoints:
        self.checkpoint = HeldCheckpoint()
        return self.checkpoint

    def warm_up(self, engine: Engine) -> None:
        """Compiles nothing: the server draws."""

    def prepare(self, engine: Engine, handed: Handed) -> Prepared:
        given: Given = handed.given
        ray = import_ray()
        try:
            return Encoded(ray.get(given.data), given.saved)
        except ray.exceptions.RayError as error:
            return StorageError(f"{handed.job.id}: its photos did not arrive ({last_line(error)})")

    def take_turn(self, engine: Engine) -> Turn:
        return take_turn(engine, engine.config.sample.every)

    def end(self, ended: Ended) -> Ended:
        return ended

    def saved(self) -> Saved | None:
        return self.checkpoint.take()


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
