"""The engine: concepts enter its slots at any time, train side by side in one compiled step, and leave as they end.

The slots are fixed in number and the step's shapes never change. Concepts share nothing but the base model: each is
trained exactly as in a run of its own. Whoever drives the engine says which concepts enter, and writes what they
learned: `catversion batch` (many_concepts.py), `catversion serve` (service/trainer.py), and `--ray` (fleet/worker.py).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.data.photos import Photo, training_photos
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.checkpoints import Checkpoints
from catversion_jax.training.concept_data import Room, check_masks, prepare
from catversion_jax.training.interrupted import InterruptedConcept, note_of
from catversion_jax.training.loop import not_finite
from catversion_jax.training.slots import Slots
from catversion_jax.training.state import ConceptData, Frozen, TrainState
from catversion_jax.training.status import DONE, FAILED, ConceptStatus
from catversion_jax.training.step import StepConfig, steps_per_dispatch, warn_of_idle_devices
from catversion_jax.training.trained_concept import to_concept
from catversion_jax.training.training_prompts import check_prompts
from catversion_jax.utils.errors import UserError, is_out_of_memory, reason
from catversion_jax.utils.log import warn
from catversion_jax.utils.settings import check_settings


@dataclass(frozen=True)
class ConceptJob:
    """A concept to learn."""

    id: str
    digest: str  # of all that it is learned from; a state that was saved under another one is not gone on from
    config: Config


def prepare_checked(
    config: Config, step: StepConfig, pipeline: BasePipeline, photos: Sequence[Photo], room: Room
) -> ConceptData:
    """Encodes a concept's photos and prompts, with that room. Raises UserError for a mistake in them."""
    check_masks(photos, config.train.background_weight)
    check_prompts(config, step.method, pipeline, photos)
    return prepare(config, step.method, pipeline, photos, room)


def untrained(config: Config, step: StepConfig, pipeline: BasePipeline) -> Concept:
    """Returns a concept that has learned nothing, by which what draws can be compiled."""
    return to_concept(config, step.method, pipeline.fingerprint, step.init_state([config.seed]))


class Ended(NamedTuple):
    """A concept that is done, or one that failed."""

    status: ConceptStatus
    concept: Concept | None
    config: Config | None = None  # of one that is done


@contextlib.contextmanager
def told_of_failure(tell: Callable[[str], object]) -> Iterator[None]:
    """Tells, in one line, of anything that is wrong with one concept, which must not end the others."""
    try:
        yield
    except Exception as error:
        # The others take the memory that this one lacks.
        if not isinstance(error, UserError) and is_out_of_memory(error):
            raise
        tell(reason(error))


@dataclass(frozen=True)
class Entered:
    """A concept that is in a slot."""

    job: ConceptJob
    photos: int
    since: float  # time.monotonic() when it entered


class Engine:
    """The slots, the concepts in them, and the checkpoints of their states."""

    def __init__(
        self,
        config: Config,
        pipeline: BasePipeline,
        room: Room,
        checkpoints: Checkpoints,
        saved: dict[str, InterruptedConcept],
    ):
        """Sets up empty slots, each with that room. A concept in `saved` goes on from its state when it enters."""
        count, resolution = config.batch.slots, pipeline.networks.resolution
        self.config, self.stop, self.pipeline, self.room = config, config.stop, pipeline, room
        self.step_config = StepConfig.of(config, pipeline.networks, count)
        warn_of_idle_devices(config, self.step_config.mesh, count)
        # A divisor of both, so that no dispatch runs past a step after which an evaluation is due.
        self.length = math.gcd(steps_per_dispatch(config.train), self.stop.every)
        # Only the shapes of this concept are used: all slots start empty.
        blank = Photo("blank", np.zeros((resolution, resolution, 3), np.uint8), np.ones((resolution, resolution), bool))
        self.slots = Slots(
            self.step_config,
            Frozen.of(pipeline, self.step_config.mesh, config.mesh.rules, self.step_config.method),
            self.step_config.init_state([0] * count),
            prepare(config, self.step_config.method, pipeline, [blank], room),
            self.length,
        )
        self.saved, self.checkpoints = saved, checkpoints
        self.clock = self.kept = checkpoints.latest or 0  # steps of the slots, whoever was in them
        self.entered: dict[int, Entered] = {}  # by slot

    @property
    def busy(self) -> bool:
        """Whether any concept is in a slot."""
        return bool(self.entered)

    @property
    def free(self) -> int:
        """How many concepts may enter now."""
        # With early stopping, a concept enters only at a step after which the others are evaluated: the evaluations
        # of all slots then stay aligned, and one dispatch serves them all.
        if self.entered and self.stop.every and self.clock % self.stop.every:
            return 0
        return self.config.batch.slots - len(self.entered)

    def prepare_source(self, config: Config) -> ConceptData:
        """Reads and encodes what `config.data` names, and the prompts, in any thread. Raises UserError for mistakes."""
        check_settings(config)
        photos = training_photos(config.data, self.pipeline.networks.resolution)
        return prepare_checked(config, self.step_config, self.pipeline, photos, self.room)

    def enter(self, job: ConceptJob, data: ConceptData) -> None:
        """Puts a concept into an empty slot: there has to be one."""
        index = min(set(range(self.config.batch.slots)) - self.entered.keys())
        self.slots.put(index, self.state_of(job), data)
        self.entered[index] = Entered(job, int(data.photos[0]), time.monotonic())

    def remove(self, concept_id: str) -> bool:
        """Removes all that the engine has of a concept; returns whether it was in a slot."""
        self.saved.pop(concept_id, None)
        found = [index for index, entered in self.entered.items() if entered.job.id == concept_id]
        for index in found:
            del self.entered[index]
        # Also those of concepts that have ended, which may be this one: its state stays until another one enters.
        for index in set(range(self.config.batch.slots)) - self.entered.keys():
            self.slots.clear(index)
        return bool(found)

    def concept_now(self, index: int) -> Concept:
        """Returns what the concept in a slot has learned so far."""
        return self.concept_of(self.entered[index].job, self.slots.one(index))

    def concept_of(self, job: ConceptJob, state: TrainState) -> Concept:
        return to_concept(job.config, self.step_config.method, self.pipeline.fingerprint, state)

    def state_of(self, job: ConceptJob) -> TrainState:
        """Returns the state that a concept goes on from: the one that was saved, if that was of the same values."""
        saved = self.saved.pop(job.id, None)
        if saved is not None and saved.digest in (None, job.digest) and saved.state.seed[0] == job.config.seed:
            return saved.state
        if saved is not None:
            warn(f"{job.id}: it has other values than when it was interrupted; begun anew")
        return self.step_config.init_state([job.config.seed])

    def advance(self) -> list[Ended]:
        """Runs one dispatch; returns the concepts that ended with it, whose slots are empty now."""
        self.slots.advance()
        self.clock += self.length
        slots, ended = self.slots, []
        for index, entered in list(self.entered.items()):
            if slots.broken[index]:
                error = not_finite(int(slots.host.step[index]), entered.job.config)
                ended.append(Ended(ConceptStatus(entered.job.id, FAILED, error), None))
                slots.clear(index)
            elif slots.finished[index]:
                ended.append(self.finished(entered, slots.one(index), float(slots.losses[index])))
            else:
                continue
            del self.entered[index]
        return ended

    def finished(self, entered: Entered, state: TrainState, loss: float) -> Ended:
        """Returns a concept that has taken its last step, with its status."""
        job = entered.job
        concept = self.concept_of(job, state)
        seconds = round(time.monotonic() - entered.since, 1)
        status = ConceptStatus(job.id, DONE, None, entered.photos, concept.steps, loss, seconds, job.digest)
        return Ended(status, concept, job.config)

    @property
    def is_due(self) -> bool:
        """Whether `checkpoint.every` steps were taken since the states were saved."""
        return self.clock - self.kept >= self.config.checkpoint.every

    def save_if_due(self) -> None:
        if self.is_due:
            self.save()

    def save(self) -> None:
        """Saves the states of the concepts in the slots, and which concepts they are."""
        jobs = [self.entered[i].job if i in self.entered else None for i in range(self.config.batch.slots)]
        note = note_of([(job.id, job.digest) if job else None for job in jobs])
        self.checkpoints.save(self.clock, self.slots.host, note)
        self.kept = self.clock
