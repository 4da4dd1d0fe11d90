"""Writes the metrics of a run to metrics.jsonl and TensorBoard events, which a resumed run continues seamlessly."""

import json
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.types import UInt8


class MetricWriter:
    """Appends to a run's metrics and events. What an interrupted run wrote after step `start` is dropped."""

    def __init__(self, metrics: Path, events: Path, start: int):
        if metrics.is_file():
            kept = [line for line in metrics.read_text().splitlines(True) if is_before(line, start)]
            write_atomically(metrics, lambda path: path.write_text("".join(kept)))
        self._metrics = metrics.open("a", buffering=1)
        self._events = SummaryWriter(str(events), purge_step=start + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._metrics.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


def is_before(line: str, start: int) -> bool:
    """Returns whether a line of metrics belongs to a step up to `start`; a line cut by a crash does not."""
    try:
        return json.loads(line)["step"] <= start
    except ValueError:
        return False
