"""report.jsonl of a batch: a line for each concept that is done or failed. Several processes may share it."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.records import read_lines

FILE_NAME = "report.jsonl"


class Report:
    """The report in `folder`. Every change is made under a lock, so that no process overwrites another's lines."""

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self._lock = folder / f".{FILE_NAME}.lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def entries(self) -> Iterator[dict]:
        """Returns the lines of the report, without one that was cut by a crash."""
        return read_lines(self.path, dict)

    def reconcile(self, done: dict[str, bool]) -> None:
        """Keeps one line for each concept of `done` that is done, and drops those of the others, which are tried again.

        Lines of concepts that are not in `done` stay.
        """
        with self.locked():
            kept = {entry["id"]: entry for entry in self.entries() if self.stays(entry, done)}
            kept |= {id: {"id": id, "status": "done"} for id, is_done in done.items() if is_done and id not in kept}
            text = "".join(json.dumps(entry) + "\n" for entry in kept.values())
            write_atomically(self.path, lambda path: path.write_text(text))

    @staticmethod
    def stays(entry: dict, done: dict[str, bool]) -> bool:
        return entry["id"] not in done or (done[entry["id"]] and entry["status"] == "done")

    def add(self, entry: dict) -> None:
        with self.locked(), self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
