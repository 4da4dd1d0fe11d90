"""Where a fleet's concepts come from, and where goes what it learns: a run's folder, or a server."""

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from catversion_jax.config import Config
from catversion_jax.fleet.work_queue import Task
from catversion_jax.training.checkpoints import Checkpoints, Saved
from catversion_jax.training.engine import ConceptJob, Ended, Engine
from catversion_jax.training.interrupted import InterruptedConcept
from catversion_jax.training.state import ConceptData
from catversion_jax.training.status import ConceptStatus
from catversion_jax.training.turn import Turn
from catversion_jax.utils.errors import ReportedError


class Handed(NamedTuple):
    """A concept that a worker is handed."""

    job: ConceptJob
    waited: float  # seconds, so far
    given: Any  # by the driver's desk, for the home of the worker


class Encoded(NamedTuple):
    """A concept that was prepared."""

    data: ConceptData
    saved: InterruptedConcept | None  # what it goes on from


Prepared = Encoded | ReportedError
"""A ReportedError: of storage that fails, which is not the concept's fault."""


class Report(NamedTuple):
    """What a worker says after a turn."""

    turn: Turn = Turn()
    begun: tuple[str, ...] = ()  # ids of the concepts in its slots
    returned: tuple[str, ...] = ()  # ids of those that it hands back
    saved: Saved | None = None  # the states of its slots, where the driver keeps them
    warnings: tuple[str, ...] = ()
    error: ReportedError | None = None  # for which it cannot go on


class Home(Protocol):
    """A worker's side. It travels to the worker before it is opened."""

    def open(self, worker: str, config: Config) -> Checkpoints:
        """Returns where a worker of that name saves its states. Raises UserError if that is not to be reached."""

    def warm_up(self, engine: Engine) -> None:
        """Gets ready for what that engine learns: what `end` runs is compiled, which would make a turn long."""

    def prepare(self, engine: Engine, handed: Handed) -> Prepared:
        """Prepares a concept, in any thread. Raises UserError for a mistake in it."""

    def take_turn(self, engine: Engine) -> Turn:
        """Runs one dispatch."""

    def end(self, ended: Ended) -> Ended:
        """Keeps what became of a concept; returns what the driver is told of it."""

    def saved(self) -> Saved | None:
        """Returns the states that are to be sent to the driver, once."""


class Desk(Protocol):
    """The driver's side."""

    def check(self) -> None:
        """Raises StorageError if another driver has taken the home over."""

    def given(self, task: Task[ConceptJob]) -> Any:
        """Returns what a worker's home needs of a concept."""

    def take(self, report: Report) -> None:
        """Takes a worker's report in."""

    def written(self, jobs: Collection[ConceptJob]) -> list[ConceptStatus]:
        """Returns what became of those that a lost worker had ended, and not reported."""

    def fail(self, status: ConceptStatus) -> None:
        """Notes that a concept failed."""
