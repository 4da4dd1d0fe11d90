"""The half of the worker that learns: concepts from the store into the engine's slots, and what they learned back."""

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.data.dataset import encode_png
from catversion_jax.data.latents import bucket
from catversion_jax.data.photo_checks import check_photos
from catversion_jax.data.photos import Photo, training_photos
from catversion_jax.evaluation.photo_masks import subject, with_masks
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.service.fetching import Fetching
from catversion_jax.service.limits import Limits
from catversion_jax.service.outbound import fetch_photo
from catversion_jax.service.problems import is_full
from catversion_jax.service.requests import DONE, FAILED, PREPARING, QUEUED, REMOVING, TRAINING, ConceptRequest
from catversion_jax.service.store import Accepted, Store
from catversion_jax.service.uploads import digest_of_files, take_photo
from catversion_jax.training.checkpoints import open_checkpoints
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob, Ended, Engine
from catversion_jax.training.interrupted import read_interrupted
from catversion_jax.training.loop import is_due
from catversion_jax.training.preparation import Preparation, Prepared
from catversion_jax.training.state import ConceptData
from catversion_jax.training.step import StepConfig
from catversion_jax.utils.errors import one_line, reason
from catversion_jax.utils.paths import calling
from catversion_jax.utils.settings import check_settings

FETCHED_AT_ONCE = 8
"""Concepts whose photos are fetched at one time."""
MOST_LOSSES = 200
"""Points of a concept's curve that are kept; more are thinned out."""


def config_of_request(config: Config, asked: ConceptRequest, folder: Path) -> Config:
    """Returns the config of a concept. Raises UserError for values that no run could have."""
    changes = {"data.dir": str(folder / "photos"), "concept.class_word": asked.class_word, "seed": asked.seed}
    if asked.steps is not None:
        changes["train.steps"] = asked.steps
    if asked.prompts:
        changes["sample.prompts"] = tuple(asked.prompts)
    changed = config.replaced(changes)
    check_settings(changed, ("run_dir",))
    changed.sample_prompts()  # called for its UserError: of a field that there is not
    return changed


def png_of(photo: Photo) -> bytes:
    """Returns a photo as training sees it, the background dimmed where there is a mask."""
    alone = subject(photo)
    return encode_png(photo.image if alone is None else alone)


class Ready(NamedTuple):
    """A concept whose photos were read and encoded."""

    job: ConceptJob
    data: ConceptData
    seen: list[bytes]  # PNGs of the photos as training sees them, the background dimmed where there is a mask
    warnings: list[str]


@dataclass
class Progress:
    """How the training of a concept goes."""

    steps: int
    step: int = 0
    loss: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        self.losses.append((step, round(loss, 6)))
        if len(self.losses) > MOST_LOSSES:
            self.losses = self.losses[1::2]


class Snapshot(NamedTuple):
    """What a concept has learned by a step, to be shown as previews."""

    id: str
    step: int
    concept: Concept
    config: Config


class Learning:
    """The concepts that are prepared and trained. All methods are the worker's own."""

    def __init__(self, store: Store, config: Config, pipeline: BasePipeline, limits: Limits, hosts: Collection[str]):
        """Sets the engine up; concepts that were interrupted go on from what the store's checkpoints hold."""
        self.store, self.config, self.pipeline = store, config, pipeline
        self.limits, self.hosts = limits, hosts
        room = Room(bucket(limits.photos), bucket(len(config.concept.templates) + limits.photos))
        saved = read_interrupted([self.checkpoints], StepConfig.of(config, pipeline.networks, config.batch.slots))
        self.engine = Engine(config, pipeline, room, self.opened_checkpoints(), saved)
        self.is_open = True  # whether the engine's checkpoints are
        self.preparation = Preparation(self.prepare, config.batch.slots)
        self.fetching = Fetching(self.fetch_photos, FETCHED_AT_ONCE)
        self.held: Prepared[Accepted, Ready] | None = None  # taken, and not in a slot yet: the disk was full
        self.unwritten: deque[Ended] = deque()
        self.progress: dict[str, Progress] = {}  # by id, of the concepts in the slots
        self.images = 0  # learned from so far
        self.seconds_per_step = 0.0  # of all slots together, of late

    @property
    def checkpoints(self) -> Path:
        return self.store.folder / "checkpoints"

    def opened_checkpoints(self):
        return open_checkpoints(self.checkpoints, self.config.checkpoint.keep, lambda: None)

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def config_of(self, entry: Accepted) -> Config:
        """Returns the config of a concept that was asked for."""
        return config_of_request(self.config, entry.concept, self.store.concept_folder(entry.id))

    # Into the slots.

    def admit(self) -> None:
        """Prepares the next concepts that wait, and puts those that are ready into empty slots."""
        for entry in self.store.with_status("concepts", [QUEUED], self.preparation.room + self.fetching.room):
            remote = entry.concept.urls and not self.has_photos(entry)
            start, room = (
                (self.fetching.start, self.fetching.room) if remote else (self.preparation.add, self.preparation.room)
            )
            if room > 0 and self.store.set_status("concepts", entry.id, PREPARING, only=[QUEUED]):
                start(entry)
        while self.fetching.ended:
            entry, error = self.fetching.ended[0]
            if error is not None:
                self.refuse(entry, error)
            elif self.is_wanted(entry):
                self.preparation.add(entry)
            self.fetching.ended.popleft()
        while self.engine.free:
            self.held = self.held or self.preparation.take(wait=False)
            if self.held is None:
                return
            self.admit_one(*self.held)
            self.held = None

    def has_photos(self, entry: Accepted) -> bool:
        folder = self.store.concept_folder(entry.id) / "photos"
        return folder.is_dir() and any(folder.iterdir())

    def is_wanted(self, entry: Accepted) -> bool:
        """Whether a concept is to be learned still."""
        found = self.store.concept(entry.id)
        return found is not None and found.status == PREPARING

    def refuse(self, entry: Accepted, error: Exception) -> None:
        """Notes why a concept failed before its first step; where the disk is at fault, it is tried again."""
        if is_full(error):
            self.store.set_status("concepts", entry.id, QUEUED, only=[PREPARING])
            raise error
        self.fail(entry.id, reason(error))

    def admit_one(self, entry: Accepted, data: Future[Ready]) -> None:
        """Puts a concept into a slot, or notes why it failed."""
        if not self.is_wanted(entry):
            return
        try:
            ready = data.result()
            self.write_seen(entry.id, ready.seen)
        # Whatever is wrong with one concept must not end the others.
        except Exception as error:
            self.refuse(entry, error)
            return
        with self.store.transaction():
            self.store.add_outcome(entry.id, {"photos": len(ready.seen), "warnings": ready.warnings})
            wanted = self.store.set_status("concepts", entry.id, TRAINING, only=[PREPARING])
        if wanted:
            self.engine.enter(ready.job, ready.data)
            self.progress[entry.id] = Progress(ready.job.config.train.steps)

    def write_seen(self, concept_id: str, images: list[bytes]) -> None:
        """Writes the photos as training sees them."""
        folder = self.store.concept_folder(concept_id) / "seen"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            # Not flushed one by one: nobody is told of them before all are there, and a crash has them written anew.
            (folder / f"{i:03}.png").write_bytes(image)

    def prepare(self, entry: Accepted) -> Ready:
        """Reads and encodes a concept's photos, in the preparation's thread. Raises UserError for a mistake in them."""
        folder, asked, config = self.store.concept_folder(entry.id), entry.concept, self.config_of(entry)
        with calling(f"{folder}/", ""):
            photos = training_photos(config.data, self.pipeline.networks.resolution)
            if asked.create_masks and all(photo.mask is None for photo in photos):
                photos = with_masks(config, self.pipeline, photos)
            data = self.engine.prepare(config, photos)
        checked = enumerate(check_photos(photos), 1)
        warnings = [one_line(f"photo {i}: {line}") for i, of_photo in checked for line in of_photo]
        # All that the numbers depend on: with another config of the service, an interrupted concept begins anew.
        values = {k: v for k, v in config.identity().items() if k != "data.dir"} | {"create_masks": asked.create_masks}
        text = json.dumps([digest_of_files(folder / "photos"), values], sort_keys=True)
        job = ConceptJob(entry.id, hashlib.sha256(text.encode()).hexdigest()[:16], config)
        return Ready(job, data, list(map(png_of, photos)), warnings)

    def fetch_photos(self, entry: Accepted) -> None:
        """Downloads the photos of a concept: all of them or none. Raises UserError for one that cannot be had."""
        with self.store.incoming() as received, calling(f"{received}/", ""):
            (received / "photos").mkdir()
            for i, url in enumerate(entry.concept.urls):
                path = received / "photos" / f"{i:03}"
                fetch_photo(url, self.hosts, path.write_bytes)
                with calling(f"photos/{i:03}", url):
                    take_photo(path, self.limits)
            digest_of_files(received / "photos")  # which flushes them
            (received / "photos").rename(self.store.concept_folder(entry.id) / "photos")

    # In the slots.

    def train(self) -> list[Snapshot]:
        """Runs one dispatch; returns what is to be shown of concepts that have come to a preview's step."""
        engine, begun = self.engine, time.monotonic()
        before = {index: int(engine.slots.host.step[index]) for index in engine.entered}
        jobs = {index: entered.job for index, entered in engine.entered.items()}
        # At once: what ended is no longer in a slot.
        self.unwritten += engine.advance()
        took = time.monotonic() - begun
        steps = {index: int(engine.slots.host.step[index]) - step for index, step in before.items()}
        self.images += sum(steps.values()) * self.config.train.batch_size
        per_step = took / engine.length
        self.seconds_per_step = 0.9 * self.seconds_per_step + 0.1 * per_step if self.seconds_per_step else per_step
        for index, job in jobs.items():
            self.progress[job.id].add(before[index] + steps[index], float(engine.slots.losses[index]))
        return list(self.snapshots(before))

    def snapshots(self, before: dict[int, int]) -> Iterator[Snapshot]:
        for index, entered in self.engine.entered.items():
            job, step, every = entered.job, int(self.engine.slots.host.step[index]), self.config.sample.every
            if any(is_due(passed, every) for passed in range(before[index] + 1, step + 1)):
                yield Snapshot(job.id, step, self.engine.concept_now(index), job.config)

    def settle(self) -> list[Snapshot]:
        """Writes what became of the concepts that ended; returns those that are done, to be shown."""
        done = []
        while self.unwritten:
            status, concept, config = self.unwritten[0]
            if concept is None:
                self.fail(status.id, status.error or "")
            elif self.write(status.id, concept, status.seconds) and config is not None:
                done.append(Snapshot(status.id, concept.steps, concept, config))
            self.progress.pop(status.id, None)
            self.unwritten.popleft()
        return done

    def write(self, concept_id: str, concept: Concept, seconds: float | None) -> bool:
        """Writes what a concept learned and that it is done; returns False if it was to be removed."""
        found, progress = self.store.concept(concept_id), self.progress[concept_id]
        if found is None or found.status == REMOVING:
            return False
        concept_file.save(self.store.concept_file(concept_id), concept)
        outcome = {
            "step": concept.steps,
            "loss": progress.loss,
            "losses": progress.losses,
            "seconds": seconds,
        }
        return self.store.end("concepts", concept_id, DONE, outcome)

    def fail(self, concept_id: str, error: str) -> None:
        progress = self.progress.get(concept_id)
        self.store.end("concepts", concept_id, FAILED, {"error": error, "step": progress.step if progress else 0})

    # Out of the slots.

    def save_if_due(self) -> None:
        """Saves the slots from time to time; what has ended must have been written before."""
        with self.saving():
            self.engine.save_if_due()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """After a failure inside, which Orbax's manager does not outlive, the next save has a new one."""
        if not self.is_open:
            self.engine.checkpoints, self.is_open = self.opened_checkpoints(), True
        try:
            yield
        except Exception:
            self.close_checkpoints()
            raise

    def close_checkpoints(self) -> None:
        """Closes checkpoints whose last save failed, which was said already, or is not wanted any more."""
        self.is_open = False
        with suppress(Exception):
            self.engine.checkpoints.close()

    def remove(self, entries: list[Accepted]) -> None:
        """Removes concepts: from the slots, from the checkpoints, which hold what they learned, and from the store."""
        ids = {entry.id for entry in entries}
        for concept_id in ids:
            self.engine.remove(concept_id)
            self.progress.pop(concept_id, None)
        self.unwritten = deque(ended for ended in self.unwritten if ended.status.id not in ids)
        self.preparation.drop(lambda entry: entry.id in ids)
        self.fetching.drop(ids)
        if self.held is not None and self.held.job.id in ids:
            self.held = None
        self.close_checkpoints()
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for entry in entries:
            self.store.remove_concept(entry)
        if self.engine.busy:
            with self.saving():
                self.engine.save()

    def close(self) -> None:
        """Writes what has ended, saves the slots, and waits for both."""
        self.preparation.close()
        self.settle()
        with self.saving():
            if self.engine.busy:
                self.engine.save()
            self.engine.checkpoints.close()

    def estimated_seconds(self, entry: Accepted, ahead: int) -> float | None:
        """Returns about how long a concept will take with `ahead` others before it; None before the first step."""
        if not self.seconds_per_step:
            return None
        progress = self.progress.get(entry.id)
        if progress is not None:
            return (progress.steps - progress.step) * self.seconds_per_step
        left = [of.steps - of.step for of in list(self.progress.values())]
        own, usual = entry.concept.steps or self.config.train.steps, self.config.train.steps
        slots = self.config.batch.slots
        empty = max(0, slots - len(left) - ahead)
        waits = 0.0 if empty else (sum(left) + max(0, ahead - max(0, slots - len(left))) * usual) / slots
        return (waits + own) * self.seconds_per_step
