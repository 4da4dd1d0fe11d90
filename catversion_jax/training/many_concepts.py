"""Trains the concepts of a manifest, many at once in one compiled step.

Concepts stream through a fixed number of slots, so the step's shapes never change. A slot whose concept is finished
takes the next one, which was read and encoded while the devices trained. Concepts share nothing but the base model:
each is trained exactly as in a run of its own, and processes that share a manifest need not communicate.
"""

import contextlib
import itertools
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.data import manifest
from catversion_jax.data.latents import bucket
from catversion_jax.data.manifest import Line
from catversion_jax.data.photos import NOTHING, Photo, PhotoCount, count_photos, training_photos
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import PREVIEW, Concept
from catversion_jax.training.checkpoints import explained, open_checkpoints
from catversion_jax.training.concept_data import Room, check_masks, prepare
from catversion_jax.training.distributed import Process
from catversion_jax.training.interrupted import note_of, read_interrupted
from catversion_jax.training.loop import enough_memory, not_finite, signals, started
from catversion_jax.training.previews import sample_preview
from catversion_jax.training.run import load_model
from catversion_jax.training.run_dir import Check, RunDir
from catversion_jax.training.slots import Slots
from catversion_jax.training.state import ConceptData, Frozen, TrainState
from catversion_jax.training.status import DONE, FAILED, ConceptStatus, read_statuses, remove_status, write_status
from catversion_jax.training.status import FILE_NAME as STATUS
from catversion_jax.training.step import StepConfig, steps_per_dispatch, warn_of_idle_devices
from catversion_jax.training.trained_concept import to_concept
from catversion_jax.training.training_prompts import check_prompts
from catversion_jax.utils.errors import UserError, is_out_of_memory, listed, short
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, make_folder
from catversion_jax.utils.settings import check_settings


@dataclass(frozen=True)
class Share:
    """One process's share of a manifest."""

    config: Config  # settings that the lines do not give
    manifest: AnyPath
    process: Process = Process()

    @classmethod
    def of(cls, config: Config, manifest: AnyPath, process: Process = Process()) -> "Share":
        """Returns the share. `config` gives what the lines do not; each line has its own photos and class word."""
        return cls(config.replaced({"data.dir": "", "concept.class_word": "thing"}), manifest, process)

    def lines(self) -> Iterator[Line]:
        """Yields the lines of this process, with the config's values where they have none."""
        config = self.config
        for line in itertools.islice(
            manifest.read_manifest(self.manifest), self.process.index, None, self.process.count
        ):
            yield line.resolved(self.manifest.parent, config.seed, config.train.steps)

    def config_of(self, line: Line) -> Config:
        """Returns the config of a line's concept."""
        return self.config.replaced(line.changes(self.manifest.parent))

    def photo_count(self, line: Line) -> PhotoCount:
        """Returns how many photos and captions a line has, none if its folder cannot be listed."""
        with contextlib.suppress(UserError):  # of a path that is none: this concept will fail by itself
            return count_photos(self.config_of(line).data)
        return NOTHING

    @property
    def room(self) -> Room:
        """The room that each slot has: for the most photos, and the most captions, of a line in the whole manifest."""
        counts = list(map(self.photo_count, manifest.read_manifest(self.manifest)))
        most = PhotoCount(*map(max, zip(NOTHING, *counts, strict=True)))
        return Room(bucket(max(1, most.photos)), bucket(len(self.config.concept.templates) + most.captions))


@dataclass(frozen=True)
class BatchOutcome:
    """The outcome of one process's share of a manifest."""

    folder: AnyPath
    concepts: int  # lines of the share
    attempted: int  # of them, those that were not done before this call
    failed: int
    interrupted_by: signal.Signals | None


class Ended(NamedTuple):
    """A concept that is done, or one that failed."""

    status: ConceptStatus
    concept: Concept | None


Endings = Generator[Ended, None, BatchOutcome]
"""Yields concepts as they end, in any order, and returns the outcome."""


def train_many(share: Share, pipeline: BasePipeline | None = None) -> BatchOutcome:
    """Trains a share of a manifest, as `each_trained` does, to its end."""
    endings = each_trained(share, pipeline)
    while True:
        try:
            next(endings)
        except StopIteration as end:
            return end.value


def each_trained(share: Share, pipeline: BasePipeline | None = None) -> Endings:
    """Trains a share of a manifest on the config's base model, which is loaded unless it is given as `pipeline`.

    Raises UserError for a mistake in the config or the manifest, before anything is compiled.
    """
    config = share.config
    run = RunDir.of(config)
    run.check(config, resume=True)
    room = share.room
    with run.shared(config, share.process) as check:
        return (yield from train_share(share, run, check, room, pipeline))


def train_share(share: Share, run: RunDir, check: Check, room: Room, pipeline: BasePipeline | None) -> Endings:
    """Trains a share in a folder that is held for it; each slot has that room."""
    config = share.config
    # Two listings, and not a question for each concept: a bucket takes some ten milliseconds for each.
    learned, told = found_ids(run, concept_file.FILE_NAME), found_ids(run, STATUS)
    done = {line.id: line.id in learned for line in share.lines()}
    refuse_changed_lines(share, run, learned & told)
    for concept_id, is_done in done.items():
        if is_done and concept_id not in told:  # a crash came between the two files
            write_status(run.path / concept_id, ConceptStatus(concept_id, DONE))
        elif not is_done and concept_id in told:  # it failed, and is tried again
            remove_status(run.path / concept_id)
    left = len(done) - sum(done.values())
    if not left:
        return BatchOutcome(run.path, len(done), 0, 0, None)
    todo = f"lower batch.slots ({config.batch.slots}) or train.batch_size ({config.train.batch_size})"
    with enough_memory(todo):
        batch = ManyConcepts(share, pipeline or load_model(config, config.batch.slots), check, room)
        with tqdm(total=len(done), initial=len(done) - left, unit=" concepts", desc="compiling") as bar:
            interrupted_by = yield from batch.train((line for line in share.lines() if not done[line.id]), bar)
    return BatchOutcome(run.path, len(done), left, batch.failed, interrupted_by)


def found_ids(run: RunDir, file: str) -> set[str]:
    """Returns the ids of the concepts that have a file of that name."""
    return {path.parent.name for path in run.path.glob(f"*/{file}")}


def refuse_changed_lines(share: Share, run: RunDir, done: Collection[str]) -> None:
    """Raises UserError if a concept is done that was learned with other values than its line has now."""
    lines = {line.id: line.digest for line in share.lines() if line.id in done}
    statuses = read_statuses(run.path / concept_id / STATUS for concept_id in lines)
    changed = [
        concept_id
        for (concept_id, digest), status in zip(lines.items(), statuses, strict=True)
        if status.digest not in (None, digest)
    ]
    if changed:
        raise UserError(
            f"{share.manifest}: concepts that are done already have other values here ({listed(changed)}); give the "
            f"old values or another id, or remove {run.path}/ID to learn it anew"
        )


Prepared = tuple[Line, Future]


def ahead(lines: Iterable[Line], prepare: Callable[[Line], ConceptData], count: int) -> Generator[Prepared]:
    """Yields each line with the future of `prepare(line)`, which runs in a thread, up to `count` lines ahead."""
    # In a thread, so that the devices do not wait for photos to be read and decoded; only `count` lines ahead, so that
    # memory on the host does not grow with the manifest.
    pool = ThreadPoolExecutor(1)
    waiting: deque[Prepared] = deque()
    try:
        for line in lines:
            waiting.append((line, pool.submit(prepare, line)))
            if len(waiting) > count:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Entered:
    """A concept that is in a slot."""

    line: Line
    config: Config
    photos: int
    since: float  # time.monotonic() when it entered


class ManyConcepts:
    """The slots of one process, and the concepts that pass through them."""

    def __init__(self, share: Share, pipeline: BasePipeline, check: Check, room: Room):
        """Loads the saved states and sets up empty slots, each with that room."""
        self.share, self.pipeline, self.check, self.room = share, pipeline, check, room
        config, networks = share.config, pipeline.networks
        self.config, self.stop, self.run = config, config.stop, RunDir.of(config)
        count, resolution = config.batch.slots, networks.resolution
        self.step_config = StepConfig.of(config, networks, count)
        warn_of_idle_devices(config, self.step_config.mesh, count)
        # A divisor of both, so that no dispatch runs past a step after which an evaluation is due.
        self.length = math.gcd(steps_per_dispatch(config.train), self.stop.every)
        # Only the shapes of this concept are used: all slots start empty.
        blank = Photo("blank", np.zeros((resolution, resolution, 3), np.uint8), np.ones((resolution, resolution), bool))
        self.slots = Slots(
            self.step_config,
            Frozen.of(pipeline, self.step_config.mesh, config.mesh.rules),
            self.step_config.init_state([0] * count),
            prepare(config, self.step_config.method, pipeline, [blank], room),
            self.length,
        )
        self.saved = read_interrupted(self.run.of_processes, self.step_config)
        self.checkpoints = open_checkpoints(self.run.of_process(share.process), config.checkpoint.keep, check)
        self.clock = self.kept = self.checkpoints.latest or 0  # steps of the slots, whoever was in them
        self.entered: dict[int, Entered] = {}  # by slot
        self.failed = 0
        self.ended: deque[Ended] = deque()

    def train(self, lines: Iterable[Line], bar: tqdm) -> Generator[Ended, None, signal.Signals | None]:
        """Trains until no line is left. Returns the signal that ended the training early, if one did."""
        queue = ahead(lines, self.prepare, self.config.batch.slots)
        try:
            with signals() as received:
                while not received and self.fill(queue, bar):
                    self.slots.advance()
                    self.clock += self.length
                    self.harvest(bar)
                    if self.clock - self.kept >= self.config.checkpoint.every:
                        self.save()
                    yield from self.take_ended()
                if self.entered:
                    self.save()
            yield from self.take_ended()
            return received[0] if received and bar.n < (bar.total or 0) else None
        finally:
            queue.close()
            self.checkpoints.close()

    def take_ended(self) -> Iterator[Ended]:
        while self.ended:
            yield self.ended.popleft()

    def prepare(self, line: Line) -> ConceptData:
        """Reads and encodes a line's photos and prompts for the step."""
        config = self.share.config_of(line)
        check_settings(config)
        photos = training_photos(config.data, self.pipeline.networks.resolution)
        check_masks(photos, config.train.background_weight)
        check_prompts(config, self.step_config.method, self.pipeline, photos)
        return prepare(config, self.step_config.method, self.pipeline, photos, self.room)

    def fill(self, queue: Iterator[Prepared], bar: tqdm) -> bool:
        """Puts the next concepts into the empty slots; returns whether any slot is in use."""
        # With early stopping, a concept enters only at a step after which the others are evaluated: the evaluations
        # of all slots then stay aligned, and one dispatch serves them all.
        if self.entered and self.stop.every and self.clock % self.stop.every:
            return True
        for index in sorted(set(range(self.config.batch.slots)) - self.entered.keys()):
            found = self.next_good(queue, bar)
            if found is None:
                break
            line, data = found
            config = self.share.config_of(line)
            self.slots.put(index, self.state_of(line, config), data)
            self.entered[index] = Entered(line, config, int(data.photos[0]), time.monotonic())
        return bool(self.entered)

    def state_of(self, line: Line, config: Config) -> TrainState:
        """Returns the state that a line goes on from: the one that was saved, if that was of the same values."""
        saved = self.saved.pop(line.id, None)
        if saved is not None and saved.digest in (None, line.digest) and saved.state.seed[0] == config.seed:
            return saved.state
        if saved is not None:
            warn(f"{line.id}: its line has other values than when it was interrupted; begun anew")
        return self.step_config.init_state([config.seed])

    def next_good(self, queue: Iterator[Prepared], bar: tqdm) -> tuple[Line, ConceptData] | None:
        """Returns the next line that could be prepared, or None; lines that could not are reported as failed."""
        for line, future in queue:
            try:
                return line, future.result()
            except UserError as error:
                self.fail(line, str(error), bar)
            # Not UserError alone: whatever is wrong with one concept must not end the others.
            except Exception as error:
                if is_out_of_memory(error):  # the others take the memory that this one lacks
                    raise
                self.fail(line, f"{type(error).__name__}: {short(error)}", bar)
        return None

    def harvest(self, bar: tqdm) -> None:
        """Empties the slots whose concepts are finished or broken."""
        slots = self.slots
        for index, entered in list(self.entered.items()):
            if slots.broken[index]:
                self.fail(entered.line, not_finite(int(slots.host.step[index]), entered.config), bar)
                slots.clear(index)
            elif slots.finished[index]:
                self.finish(entered, slots.one(index), float(slots.losses[index]), bar)
            else:
                continue
            del self.entered[index]
        started(bar)
        bar.set_postfix(step=self.clock, loss=f"{slots.losses.mean():.4f}", refresh=False)

    def fail(self, line: Line, error: str, bar: tqdm) -> None:
        self.check()
        self.failed += 1
        status = ConceptStatus(line.id, FAILED, error)
        write_status(self.run.path / line.id, status)
        self.ended.append(Ended(status, None))
        bar.update()

    def finish(self, entered: Entered, state: TrainState, loss: float, bar: tqdm) -> None:
        """Writes the concept and reports it as done."""
        line, folder = entered.line, self.run.path / entered.line.id
        path = folder / concept_file.FILE_NAME
        self.check()
        concept = to_concept(entered.config, self.step_config.method, self.pipeline.fingerprint, state)
        with explained(f"{path}: could not write the concept"):
            make_folder(folder)
            concept_file.save(path, concept)
        seconds = round(time.monotonic() - entered.since, 1)
        steps, photos = concept.steps, entered.photos
        status = ConceptStatus(line.id, DONE, None, photos, steps, loss, seconds, line.digest)
        write_status(folder, status)
        self.preview(entered, concept)
        self.ended.append(Ended(status, concept))
        bar.update()

    def preview(self, entered: Entered, concept: Concept) -> None:
        """Samples a few prompts with a concept that is done; one that gives no images is done all the same."""
        count = self.config.batch.previews
        if count == 0:
            return
        try:
            image = sample_preview(entered.config, self.pipeline, concept, count)
        except UserError as error:
            warn(f"{entered.line.id}: no {PREVIEW}: {error}")
            return
        path = self.run.path / entered.line.id / PREVIEW
        with explained(f"{path}: could not write the preview"):
            write_atomically(path, image.save)

    def save(self) -> None:
        """Saves the states of the concepts in the slots, and which concepts they are."""
        lines = [self.entered[i].line if i in self.entered else None for i in range(self.config.batch.slots)]
        self.checkpoints.save(self.clock, self.slots.host, note_of(lines))
        self.kept = self.clock
