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
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.config import Config
from catversion_jax.data import manifest
from catversion_jax.data.latents import bucket
from catversion_jax.data.manifest import Line
from catversion_jax.data.photos import Photo, count_photos, read_photos
from catversion_jax.methods import concept_file
from catversion_jax.training.checkpoints import Checkpoints, explained
from catversion_jax.training.concept_data import check_masks, check_prompts, prepare
from catversion_jax.training.distributed import Process
from catversion_jax.training.interrupted import note_of, read_interrupted
from catversion_jax.training.loop import enough_memory, not_finite, signals, started
from catversion_jax.training.report import DONE, FAILED, Report, ReportEntry
from catversion_jax.training.run import load_model
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.slots import Slots
from catversion_jax.training.state import ConceptData, Frozen, TrainState
from catversion_jax.training.step import StepConfig, steps_per_dispatch, warn_of_idle_devices
from catversion_jax.training.trained_concept import to_concept
from catversion_jax.utils.errors import UserError, is_out_of_memory, listed, short
from catversion_jax.utils.log import warn
from catversion_jax.utils.settings import check_settings


@dataclass(frozen=True)
class Share:
    """One process's share of a manifest."""

    config: Config  # settings that the lines do not give
    manifest: Path
    process: Process = Process()

    @classmethod
    def of(cls, config: Config, manifest: Path, process: Process = Process()) -> "Share":
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

    def photo_count(self, line: Line) -> int:
        """Returns how many photos a line has, 0 if its folder cannot be listed; at most 100."""
        with contextlib.suppress(UserError):  # of a path that is none: this concept will fail by itself
            return count_photos(self.config_of(line).data.dir)
        return 0

    @property
    def most_photos(self) -> int:
        """The largest number of photos of a line in the whole manifest, for which each slot has room."""
        return max(1, *map(self.photo_count, manifest.read_manifest(self.manifest)))


@dataclass(frozen=True)
class BatchOutcome:
    """The outcome of one process's share of a manifest."""

    concepts: int  # lines of the share
    attempted: int  # of them, those that were not done before this call
    failed: int
    report: Path
    interrupted_by: signal.Signals | None


def train_many(share: Share, pipeline: Pipeline | None = None) -> BatchOutcome:
    """Trains a share of a manifest on the config's base model, which is loaded unless it is given as `pipeline`.

    Raises UserError for a mistake in the config or the manifest, before anything is compiled.
    """
    config = share.config
    run = RunDir.of(config)
    run.check(config, resume=True)
    size = bucket(share.most_photos)
    with run.shared(config, share.process):
        return train_share(share, run, size, pipeline)


def train_share(share: Share, run: RunDir, size: int, pipeline: Pipeline | None) -> BatchOutcome:
    """Trains a share in a folder that is held for it; a slot has room for `size` photos."""
    config, report = share.config, Report(run.path)
    done = {line.id: artifact_path(run, line).is_file() for line in share.lines()}
    refuse_changed_lines(share, run, report)
    report.reconcile(done)
    left = len(done) - sum(done.values())
    if not left:
        return BatchOutcome(len(done), 0, 0, report.path, None)
    todo = f"lower batch.slots ({config.batch.slots}) or train.batch_size ({config.train.batch_size})"
    with enough_memory(todo):
        batch = ManyConcepts(share, pipeline or load_model(config, config.batch.slots), report, size)
        with tqdm(total=len(done), initial=len(done) - left, unit=" concepts", desc="compiling") as bar:
            interrupted_by = batch.train((line for line in share.lines() if not done[line.id]), bar)
    return BatchOutcome(len(done), left, batch.failed, report.path, interrupted_by)


def refuse_changed_lines(share: Share, run: RunDir, report: Report) -> None:
    """Raises UserError if a concept is done that was learned with other values than its line has now."""
    learned_with = {entry.id: entry.digest for entry in report.entries() if entry.status == DONE and entry.digest}
    changed = [
        line.id
        for line in share.lines()
        if learned_with.get(line.id, line.digest) != line.digest and artifact_path(run, line).is_file()
    ]
    if changed:
        raise UserError(
            f"{share.manifest}: concepts that are done already have other values here ({listed(changed)}); give the "
            f"old values or another id, or remove {run.path}/ID to learn it anew"
        )


def artifact_path(run: RunDir, line: Line) -> Path:
    return run.path / line.id / concept_file.FILE_NAME


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
    since: float  # time.monotonic() when it entered


class ManyConcepts:
    """The slots of one process, and the concepts that pass through them."""

    def __init__(self, share: Share, pipeline: Pipeline, report: Report, size: int):
        """Loads the saved states and sets up empty slots; `size` is the number of photos that a slot has room for."""
        self.share, self.pipeline, self.report, self.size = share, pipeline, report, size
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
            prepare(config, self.step_config.method, pipeline, [blank], size),
            self.length,
        )
        self.saved = read_interrupted(self.run.of_processes, self.step_config)
        self.checkpoints = Checkpoints(self.run.of_process(share.process), config.checkpoint.keep)
        self.clock = self.kept = self.checkpoints.latest or 0  # steps of the slots, whoever was in them
        self.entered: dict[int, Entered] = {}  # by slot
        self.failed = 0

    def train(self, lines: Iterable[Line], bar: tqdm) -> signal.Signals | None:
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
                if self.entered:
                    self.save()
            return received[0] if received and bar.n < (bar.total or 0) else None
        finally:
            queue.close()
            self.checkpoints.close()

    def prepare(self, line: Line) -> ConceptData:
        """Reads and encodes a line's photos and prompts for the step."""
        config = self.share.config_of(line)
        check_settings(config)
        photos = read_photos(config.data.dir, self.pipeline.networks.resolution, config.data.masks_dir)
        check_masks(photos, config.train.background_weight)
        check_prompts(config, self.step_config.method, self.pipeline)
        return prepare(config, self.step_config.method, self.pipeline, photos, self.size)

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
            self.entered[index] = Entered(line, config, time.monotonic())
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
        self.failed += 1
        self.report.add(ReportEntry(line.id, FAILED, error))
        bar.update()

    def finish(self, entered: Entered, state: TrainState, loss: float, bar: tqdm) -> None:
        """Writes the concept and reports it as done."""
        path = artifact_path(self.run, entered.line)
        concept = to_concept(entered.config, self.step_config.method, self.pipeline.fingerprint, state)
        with explained(f"{path}: could not write the concept"):
            path.parent.mkdir(exist_ok=True)
            concept_file.save(path, concept)
        seconds = round(time.monotonic() - entered.since, 1)
        line = entered.line
        done = ReportEntry(line.id, DONE, steps=concept.steps, loss=loss, seconds=seconds, digest=line.digest)
        self.report.add(done)
        bar.update()

    def save(self) -> None:
        """Saves the states of the concepts in the slots, and which concepts they are."""
        lines = [self.entered[i].line if i in self.entered else None for i in range(self.config.batch.slots)]
        self.checkpoints.save(self.clock, self.slots.host, note_of(lines))
        self.kept = self.clock
