"""The half of the worker that learns: concepts from the store to whoever trains them, and what they learned back."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
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
from catversion_jax.service.trainer import Trainer
from catversion_jax.service.uploads import digest_of_files, take_photo
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import ConceptJob, Ended, prepare_checked, untrained
from catversion_jax.training.preparation import Preparation, Prepared
from catversion_jax.training.state import ConceptData
from catversion_jax.training.step import StepConfig
from catversion_jax.training.turn import Snapshot, Turn
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
        # Where a worker was lost, some steps are taken again.
        while self.losses and self.losses[-1][0] >= step:
            self.losses.pop()
        self.losses.append((step, round(loss, 6)))
        if len(self.losses) > MOST_LOSSES:
            self.losses = self.losses[1::2]


class Learning:
    """The concepts that are prepared and trained. All methods are the worker's own."""

    def __init__(
        self,
        store: Store,
        config: Config,
        pipeline: BasePipeline,
        limits: Limits,
        hosts: Collection[str],
        set_up: Callable[[StepConfig, Room], Trainer],
    ):
        """`set_up` makes the trainer, which has that room for each concept's photos and prompts."""
        self.store, self.config, self.pipeline = store, config, pipeline
        self.limits, self.hosts = limits, hosts
        self.room = Room(bucket(limits.photos), bucket(len(config.concept.templates) + limits.photos))
        self.step_config = StepConfig.of(config, pipeline.networks, config.batch.slots)
        self.trainer = set_up(self.step_config, self.room)
        self.preparation = Preparation(self.prepare, config.batch.slots)
        self.fetching = Fetching(self.fetch_photos, FETCHED_AT_ONCE)
        self.held: Prepared[Accepted, Ready] | None = None  # taken, and not in a slot yet: the disk was full
        self.unwritten: deque[Ended] = deque()
        self.progress: dict[str, Progress] = {}  # by id, of the concepts in training
        self.images = 0  # learned from so far
        self.seconds_per_step = 0.0  # of all slots together, of late

    def untrained(self) -> Concept:
        """Returns a concept that has learned nothing, by which what draws can be compiled."""
        return untrained(self.config.replaced({"concept.class_word": "thing"}), self.step_config, self.pipeline)

    def config_of(self, entry: Accepted) -> Config:
        """Returns the config of a concept that was asked for."""
        return config_of_request(self.config, entry.concept, self.store.concept_folder(entry.id))

    # Into training.

    def admit(self) -> None:
        """Prepares the next concepts that wait, and has those trained that are ready."""
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
        while self.trainer.free:
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
        """Has a concept trained, or notes why it failed."""
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
            self.trainer.enter(ready.job, ready.data)
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
            data = prepare_checked(config, self.step_config, self.pipeline, photos, self.room)
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

    # In training.

    def train(self) -> list[Snapshot]:
        """Trains for a moment; returns what is to be shown of concepts that have come to a preview's step."""
        turn = self.trainer.train()
        self.take(turn)
        return [snapshot for snapshot in turn.snapshots if snapshot.id in self.progress]

    def take(self, turn: Turn) -> None:
        """Takes in what came of training."""
        # At once: nobody else has what ended.
        self.unwritten += turn.ended
        self.images += turn.steps * self.config.train.batch_size
        if per_step := turn.seconds_per_step:
            before = self.seconds_per_step or per_step
            self.seconds_per_step = 0.9 * before + 0.1 * per_step
        for concept_id, point in turn.points.items():
            if concept_id in self.progress:  # unless it was removed meanwhile
                self.progress[concept_id].add(*point)

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
        found, progress = self.store.concept(concept_id), self.progress.get(concept_id)
        if progress is None or found is None or found.status == REMOVING:
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

    # Out of training.

    def remove(self, entries: list[Accepted]) -> None:
        """Removes concepts: from training, from the checkpoints, which hold what they learned, and from the store."""
        ids = {entry.id for entry in entries}
        for concept_id in ids:
            self.progress.pop(concept_id, None)
        self.unwritten = deque(ended for ended in self.unwritten if ended.status.id not in ids)
        self.preparation.drop(lambda entry: entry.id in ids)
        self.fetching.drop(ids)
        if self.held is not None and self.held.job.id in ids:
            self.held = None
        self.trainer.remove(ids)
        for entry in entries:
            self.store.remove_concept(entry)

    def close(self) -> None:
        """Writes what has ended, saves the states of the others, and waits for both."""
        self.preparation.close()
        self.take(self.trainer.stop())
        self.settle()
        self.trainer.close()

    def estimated_seconds(self, entry: Accepted, ahead: int) -> float | None:
        """Returns about how long a concept will take with `ahead` others before it; None before the first step."""
        if not self.seconds_per_step:
            return None
        progress = self.progress.get(entry.id)
        if progress is not None:
            return (progress.steps - progress.step) * self.seconds_per_step
        left = [of.steps - of.step for of in list(self.progress.values())]
        own, usual = entry.concept.steps or self.config.train.steps, self.config.train.steps
        slots = max(1, self.trainer.slots)
        empty = max(0, slots - len(left) - ahead)
        waits = 0.0 if empty else (sum(left) + max(0, ahead - max(0, slots - len(left))) * usual) / slots
        return (waits + own) * self.seconds_per_step
