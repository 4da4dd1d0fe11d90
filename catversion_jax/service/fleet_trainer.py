"""The workers of a Ray cluster, as a Trainer."""

import time
from collections.abc import Collection
from contextlib import suppress

import jax

from catversion_jax.config import Config
from catversion_jax.fleet.server_home import ServerHome
from catversion_jax.fleet.thread import FleetThread
from catversion_jax.fleet.worker import Setup, with_whole_paths
from catversion_jax.service.states import States
from catversion_jax.service.trainer import TrainingEndedError
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob
from catversion_jax.training.interrupted import InterruptedConcept, of_slots
from catversion_jax.training.state import ConceptData
from catversion_jax.training.step import StepConfig
from catversion_jax.training.turn import Turn
from catversion_jax.utils.errors import ReportedError, UserError
from catversion_jax.utils.log import warn

MOST_MEBIBYTES = 64
"""The largest state of a concept: the server has those of all that train in its memory."""
BETWEEN_SAVES, SHARE_OF_SAVES = 5.0, 0.05
"""The fewest seconds from one save of the states to the next, and the most of its time that a server spends on them."""


class FleetTrainer:
    """Concepts go to the workers as they enter, and their states come back, to be saved here."""

    def __init__(
        self,
        thread: FleetThread,
        config: Config,
        room: Room,
        states: States,
        saved: dict[str, InterruptedConcept],
    ):
        """Starts the workers; concepts in `saved` go on from their states."""
        self.thread, self.config, self.states = thread, config, states
        self._now = saved  # the newest states, by id
        self._is_due, self._next_save = False, 0.0
        self._entered: set[str] = set()
        thread.begin(Setup(with_whole_paths(config), room, ServerHome()), saved)

    @property
    def slots(self) -> int:
        return self.thread.learning * self.config.batch.slots

    @property
    def entered(self) -> int:
        # After a node was lost, some of them wait.
        return min(len(self._entered), self.slots)

    @property
    def free(self) -> int:
        return max(0, self.slots - len(self._entered))

    @property
    def is_busy(self) -> bool:
        return bool(self.thread.reports) or self.thread.failure is not None or self.save_is_due

    @property
    def save_is_due(self) -> bool:
        return self._is_due and time.monotonic() >= self._next_save

    def compile(self) -> None:
        """Does nothing: the workers compile the step."""

    def enter(self, job: ConceptJob, data: ConceptData) -> None:
        self._entered.add(job.id)
        self.thread.enter(job, data)

    def train(self) -> Turn:
        failure = self.thread.failure
        if failure is not None and not self.thread.reports:  # what was reported before is taken in first
            raise TrainingEndedError from failure
        return self.heard()

    def heard(self) -> Turn:
        """Takes in what the workers have reported."""
        turn, reports = Turn(), self.thread.reports
        while reports:
            report = reports.popleft()
            for concept_id, state in of_slots(report.saved) if report.saved else ():
                if concept_id in self._entered:  # it was not removed meanwhile
                    self._now[concept_id], self._is_due = state, True
            for ended in report.turn.ended:
                self._entered.discard(ended.status.id)
                self._now.pop(ended.status.id, None)
            turn = turn.then(report.turn)
        return turn

    def save_if_due(self) -> None:
        if self.save_is_due:
            begun = time.monotonic()
            self.states.save(self._now)
            took = time.monotonic() - begun
            self._is_due, self._next_save = False, time.monotonic() + max(BETWEEN_SAVES, took / SHARE_OF_SAVES)

    def remove(self, ids: Collection[str]) -> None:
        for concept_id in ids:
            self._entered.discard(concept_id)
            self._now.pop(concept_id, None)
        self.thread.cancel(ids)
        self.states.replace(self._now)

    def stop(self) -> Turn:
        with suppress(ReportedError):  # `close` saves once more, and says it
            self.states.save(self._now)  # before the workers are asked, some of whom may not answer
        self.thread.stop()
        if self.thread.failure is not None:
            warn(f"{self.thread.failure}")
        return self.heard()

    def close(self) -> None:
        self.states.save(self._now)
        self.states.close()


def check_state_size(config: Config, step: StepConfig, most: int = MOST_MEBIBYTES) -> None:
    """Raises UserError if the state of a concept is too large to be sent around."""
    shapes = jax.eval_shape(lambda: step.init_state([0]))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) >> 20
    if size > most:
        raise UserError(
            f"--ray: config.method={config.method!r} has a state of {size} MiB a concept, which the server would keep; "
            f"expected at most {most}; leave --ray out, or use catversion batch"
        )
