"""The workers of a Ray cluster, as a Trainer."""

import itertools
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.fleet.server_home import ServerHome
from catversion_jax.fleet.thread import FleetThread
from catversion_jax.fleet.worker import Setup, with_whole_paths
from catversion_jax.training.checkpoints import Checkpoints, open_checkpoints
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob
from catversion_jax.training.interrupted import note_of, of_slots, read_interrupted
from catversion_jax.training.state import ConceptData
from catversion_jax.training.step import StepConfig
from catversion_jax.training.turn import Turn
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn

MOST_MEBIBYTES = 64
"""The largest state of a concept: the server has those of all that train in its memory."""
BETWEEN_SAVES = 5.0
"""Seconds from one save of the states to the next."""


class FleetTrainer:
    """Concepts go to the workers as they enter, and their states come back, to be saved here."""

    def __init__(self, thread: FleetThread, config: Config, pipeline: BasePipeline, room: Room, folder: Path):
        """Starts the workers. Raises UserError for a method whose states are too large to come back."""
        self.thread, self.config, self.folder = thread, config, folder
        step = StepConfig.of(config, pipeline.networks, config.batch.slots)
        check_state_size(config, step)
        self._states = read_interrupted([folder], step)  # the newest ones, by id
        self._checkpoints: Checkpoints | None = self.opened_checkpoints()  # None after a failure
        self._saves = itertools.count((self._checkpoints.latest or 0) + 1)
        self._is_due, self._saved_at = False, 0.0
        self._entered: set[str] = set()
        thread.begin(Setup(with_whole_paths(config), room, ServerHome()), self._states)

    @property
    def slots(self) -> int:
        return self.thread.learning * self.config.batch.slots

    @property
    def entered(self) -> int:
        return len(self._entered)

    @property
    def free(self) -> int:
        return max(0, self.slots - self.entered)

    @property
    def is_busy(self) -> bool:
        return bool(self.thread.reports) or self.thread.failure is not None

    def compile(self) -> None:
        """Does nothing: the workers compile the step."""

    def enter(self, job: ConceptJob, data: ConceptData) -> None:
        self._entered.add(job.id)
        self.thread.enter(job, data)

    def train(self) -> Turn:
        if self.thread.failure is not None:
            raise UserError(f"--ray: {self.thread.failure}") from self.thread.failure
        return self.heard()

    def heard(self) -> Turn:
        """Takes in what the workers have reported."""
        turn, reports = Turn(), self.thread.reports
        while reports:
            report = reports.popleft()
            for concept_id, state in of_slots(report.saved) if report.saved else ():
                if concept_id in self._entered:  # it was not removed meanwhile
                    self._states[concept_id], self._is_due = state, True
            for ended in report.turn.ended:
                self._entered.discard(ended.status.id)
                self._states.pop(ended.status.id, None)
            turn = turn.then(report.turn)
        return turn

    def save_if_due(self) -> None:
        if self._is_due and time.monotonic() - self._saved_at >= BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Saves the states as those of so many slots; the ones that nobody goes on from yet are among them."""
        try:
            if self._checkpoints is None:
                self._checkpoints = self.opened_checkpoints()
            if self._states:
                state = jax.tree.map(lambda *each: np.concatenate(each), *(one.state for one in self._states.values()))
                note = note_of([(concept_id, one.digest) for concept_id, one in self._states.items()])
                self._checkpoints.save(next(self._saves), state, note)
        except Exception:
            self.close_checkpoints()
            raise
        self._is_due, self._saved_at = False, time.monotonic()

    def opened_checkpoints(self) -> Checkpoints:
        return open_checkpoints(self.folder, self.config.checkpoint.keep, lambda: None)

    def close_checkpoints(self) -> None:
        """Closes checkpoints whose last save failed, which was said already, or is not wanted any more."""
        if self._checkpoints is not None:
            with suppress(Exception):
                self._checkpoints.close()
        self._checkpoints = None

    def remove(self, ids: Collection[str]) -> None:
        for concept_id in ids:
            self._entered.discard(concept_id)
            self._states.pop(concept_id, None)
        self.thread.cancel(ids)
        self.close_checkpoints()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._is_due, self._saved_at = True, 0.0

    def stop(self) -> Turn:
        self.thread.stop()
        if self.thread.failure is not None:
            warn(f"--ray: {self.thread.failure}")
        return self.heard()

    def close(self) -> None:
        self.save()
        if self._checkpoints is not None:
            self._checkpoints.close()


def check_state_size(config: Config, step: StepConfig, most: int = MOST_MEBIBYTES) -> None:
    """Raises UserError if the state of a concept is too large to be sent around."""
    shapes = jax.eval_shape(lambda: step.init_state([0]))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) >> 20
    if size > most:
        raise UserError(
            f"--ray: config.method={config.method!r} has a state of {size} MiB a concept, which the server would keep; "
            f"expected at most {most}; leave --ray out, or use catversion batch"
        )
