"""`catversion batch`: learn the concepts of a manifest, many at once in one compiled step.

Concepts stream through a fixed number of slots: the step's shapes never change, and a slot whose concept is finished
takes the next one, which was read and encoded while the devices trained. Concepts share nothing but the base model, so
each gets the numbers of a run of its own, and processes that share a manifest need not talk to each other.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from catversion_jax import artifact, distributed, manifest, train
from catversion_jax import config as config_lib
from catversion_jax.checkpoint import Checkpoints, explained
from catversion_jax.data.photos import MAX_PHOTOS, Photo, is_candidate, read_photos
from catversion_jax.data.posteriors import bucket
from catversion_jax.errors import UserError, short
from catversion_jax.manifest import Line
from catversion_jax.pipeline import Pipeline
from catversion_jax.preparation import check_masks, prepare
from catversion_jax.report import Report
from catversion_jax.run_dir import RunDir
from catversion_jax.slots import Slots
from catversion_jax.state import ConceptData, TrainState

FAILED = 2
"""Exit status where a concept failed."""


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A file of configs/; --config.KEY=VALUE changes any key.")
    flags.DEFINE_string("manifest", None, "A file with a JSON object a line: id, dir, class_word; masks, seed, steps.")
    distributed.define_flags()


def main(arguments: flags.FlagValues) -> int:
    config = train.given_config(arguments)
    if not arguments.manifest:
        raise UserError("--manifest: missing; expected a file with a JSON object a line: id, dir, class_word")
    return run(config, config_lib.expand(arguments.manifest), distributed.start(arguments))


def run(config: ConfigDict, path: Path, process: distributed.Process, pipeline: Pipeline | None = None) -> int:
    """Learn this process's share of the manifest, in the config's base model, which `pipeline` is where it is loaded.

    Returns the exit status: 0, FAILED, or 128 + the number of the signal that interrupted it. Raises UserError for a
    mistake in the config or the manifest, before anything is compiled."""
    config = config.copy_and_resolve_references()
    config.data.dir, config.concept.class_word = "", "thing"  # each line has its own
    config_lib.check(config, without=("data.dir",))
    run = RunDir(config_lib.expand(config.run_dir))
    run.check(config, resume=True)
    size = bucket(max(1, *(photo_count(line, config, path.parent) for line in manifest.read(path))))
    run.claim(config)
    done = {line.id: artifact_path(run, line).is_file() for line in share(path, process)}
    report = Report(run.path)
    report.reconcile(done)
    left = len(done) - sum(done.values())
    if not left:
        print(f"{run.path}: all {len(done)} concepts are done already; nothing to do")
        return 0
    pipeline = pipeline or train.load_model(config, config.batch.slots)
    batch = Batch(config, path.parent, size, run, report, process, pipeline)
    with tqdm(total=len(done), initial=len(done) - left, unit=" concepts", desc="compiling") as bar:
        interrupted_by = batch.train((line for line in share(path, process) if not done[line.id]), bar)
    if interrupted_by:
        print(f"{run.path}: stopped; the same command continues")
        return 128 + interrupted_by
    print(f"{run.path}: {len(done) - batch.failed} concepts done, {batch.failed} failed; see {report.path}")
    return FAILED if batch.failed else 0


def share(path: Path, process: distributed.Process) -> Iterator[Line]:
    """This process's lines of the manifest."""
    return itertools.islice(manifest.read(path), process.index, None, process.count)


def photo_count(line: Line, config: ConfigDict, folder: Path) -> int:
    """How many photos a line has, as far as its folder can be listed."""
    try:
        return min(MAX_PHOTOS, sum(map(is_candidate, Path(line.config(config, folder).data.dir).iterdir())))
    except OSError:
        return 0


def artifact_path(run: RunDir, line: Line) -> Path:
    return run.path / line.id / artifact.FILE_NAME


Prepared = tuple[Line, Future]


def ahead(lines: Iterable[Line], prepare: Callable[[Line], ConceptData], count: int) -> Iterator[Prepared]:
    """Each line with what `prepare` makes of it in a thread, `count` lines ahead of the one that is asked for."""
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
    """A concept in its slot."""

    line: Line
    config: ConfigDict
    since: float  # time.monotonic()


class Batch:
    """One process's work on its share of a manifest."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        size: int,
        run: RunDir,
        report: Report,
        process: distributed.Process,
        pipeline: Pipeline,
    ):
        """`folder` is the manifest's; `size` is how many photos a slot has room for."""
        self.config, self.folder, self.size, self.run, self.report = config, folder, size, run, report
        count, self.stop = config.batch.slots, config.stop
        self.pipeline = pipeline
        self.step_config = train.make_step_config(config, self.pipeline.networks, count)
        self.length = math.gcd(train.steps_per_dispatch(config), self.stop.every)
        resolution = self.pipeline.networks.resolution
        blank = [
            Photo("blank", np.zeros((resolution, resolution, 3), np.uint8), np.ones((resolution, resolution), bool))
        ]
        self.slots = Slots(
            self.step_config,
            train.freeze(self.pipeline, self.step_config.mesh, config.mesh.rules),
            train.fresh_state(self.step_config, [0] * count),
            prepare(config, self.step_config.method, self.pipeline, blank, size),
            self.length,
        )
        self.saved = self.read_saved()
        place = run.checkpoints / f"{process.index}-of-{process.count}"
        self.checkpoints = Checkpoints(place, config.checkpoint.keep)
        self.clock = self.kept = self.checkpoints.latest or 0  # steps of the slots, whoever was in them
        self.entered: dict[int, Entered] = {}  # by slot
        self.failed = 0

    def train(self, lines: Iterable[Line], bar: tqdm) -> int:
        """Train until no line is left. Returns 0, or the number of the signal that ended it early."""
        queue = ahead(lines, self.prepare, self.config.batch.slots)
        try:
            with train.signals() as received:
                while not received and self.fill(queue, bar):
                    self.slots.advance()
                    self.clock += self.length
                    self.harvest(bar)
                    if self.clock - self.kept >= self.config.checkpoint.every:
                        self.save()
                if self.entered:
                    self.save()
            return int(received[0]) if received and bar.n < bar.total else 0
        finally:
            queue.close()
            self.checkpoints.close()

    def prepare(self, line: Line) -> ConceptData:
        """A line's photos and prompts as the step takes them."""
        config = line.config(self.config, self.folder)
        photos = read_photos(config.data.dir, self.pipeline.networks.resolution, config.data.masks_dir)
        check_masks(photos, config.train.background_weight)
        return prepare(config, self.step_config.method, self.pipeline, photos, self.size)

    def fill(self, queue: Iterator[Prepared], bar: tqdm) -> bool:
        """Let the next concepts into the empty slots; whether there is one in any. With evaluations, only where those
        in the slots are evaluated, so that one evaluation serves all."""
        if self.entered and self.stop.every and self.clock % self.stop.every:
            return True
        for index in sorted(set(range(self.config.batch.slots)) - self.entered.keys()):
            found = self.next_good(queue, bar)
            if found is None:
                break
            line, data = found
            config = line.config(self.config, self.folder)
            state = self.saved.pop(line.id, None)
            if state is None or state.seed[0] != config.seed:
                state = train.fresh_state(self.step_config, [config.seed])
            self.slots.put(index, state, data)
            self.entered[index] = Entered(line, config, time.monotonic())
        return bool(self.entered)

    def next_good(self, queue: Iterator[Prepared], bar: tqdm) -> tuple[Line, ConceptData] | None:
        """The next line that could be prepared; those before it failed."""
        for line, future in queue:
            try:
                return line, future.result()
            except UserError as error:
                self.fail(line, str(error), bar)
            except Exception as error:  # whatever is wrong with one concept must not disturb the others
                self.fail(line, f"{type(error).__name__}: {short(error)}", bar)
        return None

    def harvest(self, bar: tqdm) -> None:
        """Empty the slots of the concepts that are finished or broken."""
        slots = self.slots
        for index, entered in list(self.entered.items()):
            if slots.broken[index]:
                self.fail(entered.line, f"loss or gradient not finite after step {slots.host.step[index]}", bar)
                slots.clear(index)
            elif slots.finished[index]:
                self.finish(entered, slots.one(index), float(slots.losses[index]), bar)
            else:
                continue
            del self.entered[index]
        if bar.desc.startswith("compiling"):
            bar.unpause()  # the rate and the time left are those of the steps alone
            bar.set_description("training", refresh=False)
        bar.set_postfix(step=self.clock, loss=f"{slots.losses.mean():.4f}", refresh=False)

    def fail(self, line: Line, error: str, bar: tqdm) -> None:
        self.failed += 1
        self.report.add({"id": line.id, "status": "failed", "error": error})
        bar.update()

    def finish(self, entered: Entered, state: TrainState, loss: float, bar: tqdm) -> None:
        """Write what was learned, and report it."""
        path = artifact_path(self.run, entered.line)
        concept = train.to_concept(entered.config, self.step_config, self.pipeline, state)
        with explained(f"{path}: could not write the concept"):
            path.parent.mkdir(exist_ok=True)
            artifact.save(path, concept)
        seconds = round(time.monotonic() - entered.since, 1)
        line = {"id": entered.line.id, "status": "done", "steps": concept.steps, "loss": loss, "seconds": seconds}
        self.report.add(line)
        bar.update()

    def save(self) -> None:
        """Keep the states of the concepts in the slots."""
        ids = [self.entered[i].line.id if i in self.entered else None for i in range(self.config.batch.slots)]
        self.checkpoints.save(self.clock, self.slots.host, {"ids": ids})
        self.kept = self.clock

    def read_saved(self) -> dict[str, TrainState]:
        """The states of interrupted concepts by id, [1, ...] each, whichever process kept them."""
        states: dict[str, TrainState] = {}
        for folder in sorted(self.run.checkpoints.glob("*-of-*")):
            checkpoints = Checkpoints(folder, self.config.checkpoint.keep)
            if checkpoints.latest is not None:
                ids = checkpoints.note()["ids"]
                shapes = jax.eval_shape(partial(train.fresh_state, self.step_config, [0] * len(ids)))
                stacked = checkpoints.restore(jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes))
                for index, id in enumerate(ids):
                    state = jax.tree.map(lambda x, i=index: x[i : i + 1], stacked)
                    if id is not None and (id not in states or state.step > states[id].step):
                        states[id] = state
            checkpoints.close()
        return states
