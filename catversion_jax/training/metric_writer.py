"""Writes the metrics of a run to metrics.jsonl and TensorBoard events, which a resumed run continues seamlessly."""

import contextlib
import os
import struct
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from catversion_jax.training.checkpoints import explained
from catversion_jax.utils import records
from catversion_jax.utils.files import open_own, refuse_link, write_atomically
from catversion_jax.utils.paths import AnyPath, download_file, upload
from catversion_jax.utils.types import UInt8


class MetricRow(msgspec.Struct, omit_defaults=True):
    """A line of metrics.jsonl: what was measured after a step."""

    step: records.Count
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    evaluation_loss: float | None = None

    def scalars(self) -> dict[str, float]:
        """Returns the measured values by name."""
        values = msgspec.structs.asdict(self)
        return {name: value for name, value in values.items() if name != "step" and value is not None}


class MetricWriter:
    """Appends to a run's metrics and events. What an interrupted run wrote after step `start` is dropped.

    Nothing can be appended to an object of a bucket: both files are then written to this machine, and `flush` puts
    them there. Every method raises UserError or StorageError if a file cannot be written.
    """

    def __init__(self, metrics: AnyPath, events: AnyPath, start: int):
        self._path = metrics
        self._remote: dict[Path, AnyPath] = {}
        self._scratch = contextlib.ExitStack()
        with self._explained():
            if not isinstance(metrics, Path):
                folder = Path(self._scratch.enter_context(tempfile.TemporaryDirectory()))
                self._remote[folder / metrics.name] = metrics
                if metrics.exists():
                    download_file(metrics, folder / metrics.name)
                metrics = folder / metrics.name
            refuse_link(metrics)
            if metrics.exists():
                write_atomically(metrics, lambda path: copy_rows(path, metrics, start))
            self._metrics = os.fdopen(open_own(metrics, os.O_WRONLY | os.O_APPEND), "ab")
            self._events = EventFile(events if isinstance(events, Path) else metrics.parent / events.name, start)
            if not isinstance(events, Path):
                self._remote[self._events.path] = events / self._events.path.name

    def row(self, row: MetricRow) -> None:
        with self._explained():
            self._metrics.write(records.encode(row).encode() + b"\n")
            self._metrics.flush()
            for name, value in row.scalars().items():
                self._events.add(row.step, summary.scalar(name, value))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        with self._explained():
            self._events.add(step, summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        """Puts what was written into the bucket, with each checkpoint; here, every row is written at once."""
        with self._explained():
            for path, target in self._remote.items():
                upload(path, target)

    def close(self) -> None:
        with self._scratch, self._explained():
            self._metrics.close()
            self._events.close()

    def _explained(self) -> AbstractContextManager[None]:
        return explained(f"{self._path}: could not write the metrics")


def copy_rows(path: Path, source: Path, last: int) -> None:
    """Writes the rows of another file up to step `last`, one at a time."""
    with path.open("w") as file:
        for row in records.read_lines(source, MetricRow):
            if row.step <= last:
                file.write(records.encode(row) + "\n")


class EventFile:
    """A new file of events in a folder, as TensorBoard reads it.

    Not tensorboardX's own writer: that one names its file by the host, and writes in a thread, which buries the one
    line that reports a full disk under tracebacks.
    """

    def __init__(self, folder: Path, start: int):
        """Events that other files have after step `start` are dropped when they are shown."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._file = self.path.open("xb")
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: summary.Summary) -> None:
        self._write(Event(step=step, summary=values))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        # TFRecord: the length, its checksum, the data and their checksum.
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._file.write(b"".join((length, next(checks), data, next(checks))))
        self._file.flush()  # a kill loses nothing

    def close(self) -> None:
        self._file.close()
