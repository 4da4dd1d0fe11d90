"""Trains the concepts of a manifest, many at once in one compiled step.

Concepts stream through the slots of an engine (engine.py): a slot whose concept is finished takes the next one, which
was read and encoded while the devices trained. Processes that share a manifest need not communicate.
"""

import itertools
import signal
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.data.manifest import Line
from catversion_jax.training.checkpoints import open_checkpoints
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob, Ended, Engine, told_of_failure
from catversion_jax.training.interrupted import read_interrupted
from catversion_jax.training.loop import enough_memory, fewer_slots, signals, started
from catversion_jax.training.preparation import Preparation
from catversion_jax.training.results import Results
from catversion_jax.training.run import load_model
from catversion_jax.training.run_dir import Check, RunDir
from catversion_jax.training.share import Share, take_stock
from catversion_jax.training.state import ConceptData
from catversion_jax.training.status import FAILED, ConceptStatus
from catversion_jax.training.step import StepConfig
from catversion_jax.utils.paths import AnyPath


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
    stock = take_stock(share, run)
    if not stock.left:
        return BatchOutcome(run.path, stock.concepts, 0, 0, None)
    with enough_memory(fewer_slots(config)):
        batch = ManyConcepts(share, pipeline or load_model(config, config.batch.slots), check, room)
        with tqdm(total=stock.concepts, initial=len(stock.done), unit=" concepts", desc="compiling") as bar:
            interrupted_by = yield from batch.train((line for line in share.lines() if line.id not in stock.done), bar)
    return BatchOutcome(run.path, stock.concepts, stock.left, batch.failed, interrupted_by)


class ManyConcepts:
    """The engine of one process, and the lines that pass through it."""

    def __init__(self, share: Share, pipeline: BasePipeline, check: Check, room: Room):
        """Loads the saved states and sets up empty slots, each with that room."""
        config = share.config
        self.share, run = share, RunDir.of(config)
        self.results = Results(run.path, pipeline, check)
        saved = read_interrupted(run.of_processes, StepConfig.of(config, pipeline.networks, config.batch.slots))
        checkpoints = open_checkpoints(run.of_process(share.process), config.checkpoint.keep, check)
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
        return self.engine.prepare_source(self.share.config_of(line))

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
        """Writes what became of a concept."""
        self.results.write(ended)
        self.failed += ended.concept is None
        self.ended.append(ended)
        bar.update()
