"""A worker: one process with devices, a base model and slots of its own, which learns what it is handed.

The driver (driver.py) calls it through Ray. It writes its results and checkpoints to the run's folder itself.
"""

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import jax
import msgspec

from catversion_jax import __version__
from catversion_jax.config import Config
from catversion_jax.fleet.host import alone_on_tpu
from catversion_jax.training.checkpoints import open_checkpoints
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob, Ended, Engine, told_of_failure
from catversion_jax.training.interrupted import InterruptedConcept, read_interrupted
from catversion_jax.training.loop import enough_memory, fewer_slots
from catversion_jax.training.preparation import Preparation
from catversion_jax.training.previews import sample_preview
from catversion_jax.training.results import Results
from catversion_jax.training.run import load_model
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.state import ConceptData
from catversion_jax.training.status import FAILED, ConceptStatus
from catversion_jax.utils import cache
from catversion_jax.utils.errors import ReportedError, UserError
from catversion_jax.utils.log import LOGGER

TURN = 2.0
"""Seconds that a worker learns before it reports; a dispatch is always finished."""


@dataclass(frozen=True)
class Setup:
    """What every worker of a run is given."""

    config: Config
    room: Room
    claimed: str  # config.json of the run's folder, as the driver reads it
    version: str = __version__  # of the driver


class Handed(NamedTuple):
    """A concept that a worker is handed."""

    job: ConceptJob
    waited: float  # seconds, so far
    saved_by: tuple[str, ...]  # the folders of checkpoints that may have its state


class Report(NamedTuple):
    """What a worker says after a turn."""

    ended: tuple[ConceptStatus, ...] = ()
    begun: tuple[str, ...] = ()  # ids of the concepts in its slots
    returned: tuple[str, ...] = ()  # ids of those that it hands back
    loss: float = 0.0
    warnings: tuple[str, ...] = ()
    error: ReportedError | None = None  # for which it cannot go on


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

    def turn(self, handed: list[Handed], give_back: int) -> Report:
        """Takes concepts over, hands back up to `give_back` of those not begun, and learns for a while."""
        return self.reported(lambda: self._turn(handed, give_back))

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
        config = self.setup.config
        if self.setup.version != __version__:
            raise UserError(f"catversion-jax {__version__}, the driver has {self.setup.version}; install the same")
        run = RunDir.of(config)
        if not run.config.is_file() or run.config.read_text() != self.setup.claimed:
            raise UserError(f"{run.path}: not there; expected a bucket, or a folder that all nodes share")
        cache.enable()
        pipeline = load_model(config, config.batch.slots)
        checkpoints = open_checkpoints(run.checkpoints / self.name, config.checkpoint.keep, lambda: None)
        self.engine = Engine(config, pipeline, self.setup.room, checkpoints, {})
        self.results = Results(run.path, pipeline, lambda: None)
        self.preparation = Preparation(self.prepare, 2 * config.batch.slots)
        self.read: dict[str, dict[str, InterruptedConcept]] = {}  # what others before had saved, by folder
        self.waited: dict[str, float] = {}  # seconds until each concept in the slots had its first step here
        self.engine.slots.compile()
        self.draw_once()
        return Report()

    def draw_once(self) -> None:
        """Compiles what draws a preview, which would make a turn long."""
        config, engine = self.setup.config, self.engine
        if config.batch.previews:
            with contextlib.suppress(UserError):  # of prompts that this class word does not fit
                sample_preview(config, engine.pipeline, engine.untrained(config), config.batch.previews)

    def prepare(self, preparing: Preparing) -> tuple[ConceptData, InterruptedConcept | ReportedError | None]:
        """Reads and encodes a concept's photos, and what was saved of it, or why that cannot be read now."""
        job, _, saved_by = preparing.handed
        data = self.engine.prepare_source(job.config)
        try:
            saved = [found for folder in saved_by if (found := self.saved_in(folder).get(job.id)) is not None]
        except ReportedError as error:
            return data, error
        own = [found for found in saved if found.digest in (None, job.digest)]
        return data, max(own, key=lambda found: int(found.state.step[0]), default=None)

    def saved_in(self, folder: str) -> dict[str, InterruptedConcept]:
        """Returns what a worker or a process that is gone had saved."""
        if folder not in self.read:
            path = RunDir.of(self.setup.config).checkpoints / folder
            self.read[folder] = read_interrupted([path], self.engine.step_config)
        return self.read[folder]

    def _turn(self, handed: list[Handed], give_back: int) -> Report:
        engine, ended, until = self.engine, [], time.monotonic() + TURN
        for one in handed:
            self.preparation.add(Preparing(one, time.monotonic()))
        returned = tuple(self.given_back(give_back))
        while True:
            ended += self.fill()
            if engine.busy:
                for found in engine.advance():
                    ended.append(self.end(found))
                engine.save_if_due()
            is_idle = not engine.busy and not self.preparation.jobs
            if is_idle or time.monotonic() > until or (ended and not self.preparation.jobs):
                break
        loss = float(engine.slots.losses.mean())
        return Report(tuple(ended), tuple(entered.job.id for entered in engine.entered.values()), returned, loss)

    def given_back(self, count: int) -> list[str]:
        """Drops up to `count` concepts that are not begun, the last ones first."""
        ids = [preparing.handed.job.id for preparing in self.preparation.jobs[::-1]][:count]
        self.preparation.drop(lambda preparing: preparing.handed.job.id in ids)
        return ids

    def fill(self) -> list[ConceptStatus]:
        """Puts the next concepts that are prepared into empty slots; returns those that failed before."""
        failed: list[ConceptStatus] = []
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
                data, saved = prepared.data.result()
            if not prepared.data.exception():
                if isinstance(saved, ReportedError):  # the storage's fault, not the concept's
                    raise saved
                if saved is not None:
                    self.engine.saved[job.id] = saved
                self.engine.enter(job, data)
        return failed

    def end(self, ended: Ended) -> ConceptStatus:
        """Writes what became of a concept, and by whom."""
        status = msgspec.structs.replace(ended.status, node=self.node, waited=self.waited.pop(ended.status.id))
        self.results.write(ended._replace(status=status))
        return status

    def _leave(self) -> Report:
        self.preparation.close()
        if self.engine.busy:
            self.engine.save()
        self.engine.checkpoints.close()
        return Report()
