"""report.jsonl of a batch: a line for each concept that is done or failed. Several processes may share it."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from catversion_jax.utils import records
from catversion_jax.utils.files import refuse_link, write_atomically
from catversion_jax.utils.locks import lock_file

FILE_NAME = "report.jsonl"
DONE, FAILED = "done", "failed"


class ReportEntry(msgspec.Struct, omit_defaults=True):
    """A line of the report."""

    id: str
    status: str  # DONE or FAILED
    error: str | None = None
    steps: int | None = None
    loss: float | None = None  # of the last step
    seconds: float | None = None
    digest: str | None = None  # of the values that the concept was learned with; reports had none before


class Report:
    """The report in `folder`. Every change is made under a lock, so that no process overwrites another's lines."""

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with lock_file(self.path.with_name(f".{FILE_NAME}.lock")) as lock:
            lock.take(patience=math.inf)
            yield

    def entries(self) -> Iterator[ReportEntry]:
        """Returns the lines of the report, without those that a crash has cut."""
        return records.read_lines(self.path, ReportEntry)

    def reconcile(self, done: Mapping[str, bool]) -> None:
        """Keeps one line for each concept of `done` that is done, and drops those of the others, which are tried again.

        Lines of concepts that are not in `done` stay.
        """
        with self.locked():
            refuse_link(self.path)
            kept = {entry.id: entry for entry in self.entries() if self.stays(entry, done)}
            kept |= {id: ReportEntry(id, DONE) for id, is_done in done.items() if is_done and id not in kept}
            text = "".join(records.encode(entry) + "\n" for entry in kept.values())
            write_atomically(self.path, lambda path: path.write_text(text))

    @staticmethod
    def stays(entry: ReportEntry, done: Mapping[str, bool]) -> bool:
        return entry.id not in done or (done[entry.id] and entry.status == DONE)

    def add(self, entry: ReportEntry) -> None:
        with self.locked():
            records.append_line(self.path, entry)
