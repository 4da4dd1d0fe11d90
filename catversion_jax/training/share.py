"""One process's share of a manifest: its lines, the room that they need, and which of them are done."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from catversion_jax.config import Config
from catversion_jax.data import manifest
from catversion_jax.data.latents import bucket
from catversion_jax.data.manifest import Line
from catversion_jax.data.photos import NOTHING, PhotoCount, count_photos
from catversion_jax.methods import concept_file
from catversion_jax.training.concept_data import Room
from catversion_jax.training.distributed import Process
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.status import AT_ONCE, DONE, ConceptStatus, read_statuses, remove_status, write_status
from catversion_jax.training.status import FILE_NAME as STATUS
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.id_set import IdSet
from catversion_jax.utils.paths import AnyPath

ItemT = TypeVar("ItemT")
CHUNK = 1024
"""Lines that are looked at side by side: a manifest may have millions."""


def chunks(items: Iterable[ItemT]) -> Iterator[list[ItemT]]:
    items = iter(items)
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


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
        most = NOTHING
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for lines in chunks(manifest.read_manifest(self.manifest)):
                most = PhotoCount(*map(max, zip(most, *pool.map(self.photo_count, lines), strict=True)))
        return Room(bucket(max(1, most.photos)), bucket(len(self.config.concept.templates) + most.captions))


class Stock(NamedTuple):
    """What a share has, and what of it is done."""

    concepts: int  # lines of the share
    done: IdSet

    @property
    def left(self) -> int:
        return self.concepts - len(self.done)


def take_stock(share: Share, run: RunDir) -> Stock:
    """Returns which concepts of a share are done, whose folder is held; those that failed are to be tried again.

    Raises UserError if one was learned with other values than its line has now.
    """
    # Two listings, and not a question for each concept: a bucket takes some ten milliseconds for each.
    learned, told = found_ids(run, concept_file.FILE_NAME), found_ids(run, STATUS)
    refuse_changed_lines(share, run, learned, told)
    stock = Stock(0, IdSet())
    for line in share.lines():
        stock = stock._replace(concepts=stock.concepts + 1)
        if line.id in learned:
            stock.done.add(line.id)
            if line.id not in told:  # a crash came between the two files
                write_status(run.path / line.id, ConceptStatus(line.id, DONE))
        elif line.id in told:  # it failed, and is tried again
            remove_status(run.path / line.id)
    return stock


def found_ids(run: RunDir, file: str) -> IdSet:
    """Returns the ids of the concepts that have a file of that name."""
    return IdSet(path.parent.name for path in run.path.glob(f"*/{file}"))


def refuse_changed_lines(share: Share, run: RunDir, learned: IdSet, told: IdSet) -> None:
    """Raises UserError if a concept is done that was learned with other values than its line has now."""
    changed: list[str] = []
    for lines in chunks(line for line in share.lines() if line.id in learned and line.id in told):
        statuses = read_statuses(run.path / line.id / STATUS for line in lines)
        changed += [
            line.id for line, status in zip(lines, statuses, strict=True) if status.digest not in (None, line.digest)
        ]
    if changed:
        raise UserError(
            f"{share.manifest}: concepts that are done already have other values here ({listed(changed)}); give the "
            f"old values or another id, or remove {run.path}/ID to learn it anew"
        )
