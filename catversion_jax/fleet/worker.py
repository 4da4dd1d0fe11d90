"""A worker: one process with devices, a base model and slots of its own, which learns what it is handed.

The driver (driver.py) calls it through Ray. Where its concepts come from, and its results go, is its home (home.py).
"""

import logging
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import jax
import msgspec

from catversion_jax import __version__
from catversion_jax.config import Config
from catversion_jax.fleet.home import Handed, Home, Prepared, Report
from catversion_jax.fleet.host import alone_on_tpu
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob, Ended, Engine, told_of_failure
from catversion_jax.training.loop import enough_memory, fewer_slots
from catversion_jax.training.preparation import Preparation
from catversion_jax.training.run import load_model
from catversion_jax.training.status import FAILED, ConceptStatus
from catversion_jax.training.turn import Turn
from catversion_jax.utils import cache
from catversion_jax.utils.errors import ReportedError, UserError
from catversion_jax.utils.log import LOGGER
from catversion_jax.utils.paths import expand, is_remote, whole

TURN = 2.0
"""Seconds that a worker learns before it reports; a dispatch is always finished."""


@dataclass(frozen=True)
class Setup:
    """What every worker of a run is given."""

    config: Config
    room: Room
    home: Home
    version: str = __version__  # of the driver


def with_whole_paths(config: Config) -> Config:
    """Returns the config with paths that mean the same in every process."""
    run_dir, model = config.run_dir, config.model.path
    changes = {"run_dir": whole(run_dir)} if run_dir else {}
    # An empty path is the model of the package, and one that is not there may be the name of a model of the Hub.
    if model and not is_remote(expand(model)) and expand(model).exists():
        changes["model.path"] = whole(model)
    return config.replaced(changes)


class KeptWarnings(logging.Handler):
    """Keeps warnings until they are reported."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def taken(self) -> tuple[str, ...]:
        messages, self.messages = tuple(self.messages), []
        return messages


class Preparing(NamedTuple):
    """A concept that is prepared."""

    handed: Handed
    since: float  # time.monotonic() when it was handed over


class ConceptWorker:
    """Learns concepts. Each method returns a report, and raises nothing that a person has to read."""

    def __init__(self, name: str, node: str, environment: dict[str, str], setup: Setup):
        """`name` is that of its folder of checkpoints."""
        self.name, self.node, self.setup = name, node, setup
        os.environ.update(environment | alone_on_tpu())
        # JAX has read the variable already, when this class was imported.
        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or None)
        self.kept = KeptWarnings()
        LOGGER.addHandler(self.kept)
        LOGGER.propagate = False

    def __repr__(self) -> str:
        return self.name

    def start(self) -> Report:
        """Loads the base model and compiles the step."""
        return self.reported(self._start)

    def turn(self, handed: list[Handed], give_back: int, cancelled: Collection[str] = ()) -> Report:
        """Takes concepts over, hands back up to `give_back` of those not begun, and learns for a while.

        Those whose ids are `cancelled` leave their slots.
        """
        return self.reported(lambda: self._turn(handed, give_back, cancelled))

    def leave(self) -> Report:
        """Saves the states of the concepts in the slots, and ends."""
        return self.reported(self._leave)

    def reported(self, act) -> Report:
        try:
            with enough_memory(fewer_slots(self.setup.config)):
                return act()._replace(warnings=self.kept.taken())
        except ReportedError as error:
            return Report(warnings=self.kept.taken(), error=type(error)(f"{self.node}: {error}"))

    def _start(self) -> Report:
        config, home = self.setup.config, self.setup.home
        if self.setup.version != __version__:
            raise UserError(f"catversion-jax {__version__}, the driver has {self.setup.version}; install the same")
        cache.enable()
        checkpoints = home.open(self.name, config)
        pipeline = load_model(config, config.batch.slots)
        self.engine, self.home = Engine(config, pipeline, self.setup.room, checkpoints, {}), home
        self.preparation = Preparation(self.prepare, 2 * config.batch.slots)
        self.waited: dict[str, float] = {}  # seconds until each concept in the slots had its first step here
        self.engine.slots.compile()
        home.warm_up(self.engine)
        return Report()

    def prepare(self, preparing: Preparing) -> Prepared:
        return self.home.prepare(self.engine, preparing.handed)

    def _turn(self, handed: list[Handed], give_back: int, cancelled: Collection[str]) -> Report:
        engine, turn, until = self.engine, Turn(), time.monotonic() + TURN
        for concept_id in cancelled:
            engine.remove(concept_id)
        self.preparation.drop(lambda preparing: preparing.handed.job.id in cancelled)
        for one in handed:
            self.preparation.add(Preparing(one, time.monotonic()))
        returned = tuple(self.given_back(give_back))
        while True:
            turn = turn.then(Turn(tuple(self.fill())))
            if engine.busy:
                found = self.home.take_turn(engine)
                turn = turn.then(found._replace(ended=tuple(map(self.end, found.ended))))
                engine.save_if_due()
            is_idle = not engine.busy and not self.preparation.jobs
            if is_idle or time.monotonic() > until or (turn.ended and not self.preparation.jobs):
                break
        begun = tuple(entered.job.id for entered in engine.entered.values())
        return Report(turn, begun, returned, self.home.saved())

    def given_back(self, count: int) -> list[str]:
        """Drops up to `count` concepts that are not begun, the last ones first."""
        ids = [preparing.handed.job.id for preparing in self.preparation.jobs[::-1]][:count]
        self.preparation.drop(lambda preparing: preparing.handed.job.id in ids)
        return ids

    def fill(self) -> list[Ended]:
        """Puts the next concepts that are prepared into empty slots; returns those that failed before."""
        failed: list[Ended] = []
        while self.engine.free:
            # While others train, a concept whose photos take their time is not waited for.
            prepared = self.preparation.take(wait=not self.engine.busy)
            if prepared is None:
                break
            (job, waited, _), since = prepared.job
            self.waited[job.id] = round(waited + time.monotonic() - since, 1)

            def tell(error: str, job: ConceptJob = job) -> None:
                failed.append(self.end(Ended(ConceptStatus(job.id, FAILED, error, digest=job.digest), None)))

            with told_of_failure(tell):
                ready = prepared.data.result()
            if not prepared.data.exception():
                if isinstance(ready, ReportedError):
                    raise ready
                if ready.saved is not None:
                    self.engine.saved[job.id] = ready.saved
                self.engine.enter(job, ready.data)
        return failed

    def end(self, ended: Ended) -> Ended:
        """Keeps what became of a concept, and who learned it."""
        status = msgspec.structs.replace(ended.status, node=self.node, waited=self.waited.pop(ended.status.id))
        return self.home.end(ended._replace(status=status))

    def _leave(self) -> Report:
        self.preparation.close()
        if self.engine.busy:
            self.engine.save()
        self.engine.checkpoints.close()
        return Report(saved=self.home.saved())
