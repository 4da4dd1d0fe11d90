"""Trains the concepts of a manifest, many at once in one compiled step.

Concepts stream through the slots of an engine (engine.py): a slot whose concept is finished takes the next one, which
was read and encoded while the devices trained. Processes that share a manifest need not communicate.
"""

import contextlib
import itertools
import signal
from collections import deque
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.data import manifest
from catversion_jax.data.latents import bucket
from catversion_jax.data.manifest import Line
from catversion_jax.data.photos import NOTHING, PhotoCount, count_photos, training_photos
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import PREVIEW, Concept
from catversion_jax.training.checkpoints import explained, open_checkpoints
from catversion_jax.training.concept_data import Room
from catversion_jax.training.distributed import Process
from catversion_jax.training.engine import ConceptJob, Ended, Engine, told_of_failure
from catversion_jax.training.interrupted import read_interrupted
from catversion_jax.training.loop import enough_memory, signals, started
from catversion_jax.training.preparation import Preparation
from catversion_jax.training.previews import sample_preview
from catversion_jax.training.run import load_model
from catversion_jax.training.run_dir import Check, RunDir
from catversion_jax.training.state import ConceptData
from catversion_jax.training.status import DONE, FAILED, ConceptStatus, read_statuses, remove_status, write_status
from catversion_jax.training.status import FILE_NAME as STATUS
from catversion_jax.training.step import StepConfig
from catversion_jax.utils.errors import UserError, listed
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


class ManyConcepts:
    """The engine of one process, and the lines that pass through it."""

    def __init__(self, share: Share, pipeline: BasePipeline, check: Check, room: Room):
        """Loads the saved states and sets up empty slots, each with that room."""
        config = share.config
        self.share, self.pipeline, self.check, self.run = share, pipeline, check, RunDir.of(config)
        saved = read_interrupted(self.run.of_processes, StepConfig.of(config, pipeline.networks, config.batch.slots))
        checkpoints = open_checkpoints(self.run.of_process(share.process), config.checkpoint.keep, check)
        self.engine = Engine(config, pipeline, room, checkpoints, saved)
        self.failed = 0
        self.ended: deque[Ended] = deque()

    def train(self, lines: Iterator[Line], bar: tqdm) -> Generator[Ended, None, signal.Signals | None]:
        """Trains until no line is left. Returns the signal that ended the training early, if one did."""
        engine, queue = self.engine, Preparation(self.prepare, self.share.config.batch.slots)
        try:
            with signals() as received:
                while not received and self.fill(queue, lines, bar):
                    for ended in engine.advance():
                        self.end(ended, bar)
                    started(bar)
                    bar.set_postfix(step=engine.clock, loss=f"{engine.slots.losses.mean():.4f}", refresh=False)
                    engine.save_if_due()
                    yield from self.take_ended()
                if engine.busy:
                    engine.save()
            yield from self.take_ended()
            return received[0] if received and bar.n < (bar.total or 0) else None
        finally:
            queue.close()
            engine.checkpoints.close()

    def take_ended(self) -> Iterator[Ended]:
        while self.ended:
            yield self.ended.popleft()

    def prepare(self, line: Line) -> ConceptData:
        """Reads and encodes a line's photos and prompts for the step."""
        config = self.share.config_of(line)
        check_settings(config)
        return self.engine.prepare(config, training_photos(config.data, self.pipeline.networks.resolution))

    def fill(self, queue: Preparation[Line, ConceptData], lines: Iterator[Line], bar: tqdm) -> bool:
        """Puts the next concepts that are prepared into empty slots; returns whether any slot is in use."""
        engine = self.engine
        while True:
            for line in itertools.islice(lines, queue.room):
                queue.add(line)
            # While others train, a concept whose photos take their time is not waited for.
            if not engine.free or (prepared := queue.take(wait=not engine.busy)) is None:
                return engine.busy
            line, data = prepared
            with told_of_failure(partial(self.fail, line, bar)):
                engine.enter(ConceptJob(line.id, line.digest, self.share.config_of(line)), data.result())

    def fail(self, line: Line, bar: tqdm, error: str) -> None:
        self.end(Ended(ConceptStatus(line.id, FAILED, error), None), bar)

    def end(self, ended: Ended, bar: tqdm) -> None:
        """Writes what became of a concept: what it learned and its preview, or why it failed."""
        status, concept, config = ended
        folder = self.run.path / status.id
        self.check()
        if concept is None:
            self.failed += 1
        else:
            path = folder / concept_file.FILE_NAME
            with explained(f"{path}: could not write the concept"):
                make_folder(folder)
                concept_file.save(path, concept)
        write_status(folder, status)
        if concept is not None and config is not None:
            self.preview(folder, config, concept)
        self.ended.append(ended)
        bar.update()

    def preview(self, folder: AnyPath, config: Config, concept: Concept) -> None:
        """Samples a few prompts with a concept that is done; one that gives no images is done all the same."""
        count = config.batch.previews
        if count == 0:
            return
        try:
            image = sample_preview(config, self.pipeline, concept, count)
        except UserError as error:
            warn(f"{folder.name}: no {PREVIEW}: {error}")
            return
        path = folder / PREVIEW
        with explained(f"{path}: could not write the preview"):
            write_atomically(path, image.save)
