"""Who is told of a training while it runs: its own files, a function, and runs in Weights & Biases or trackio."""

import contextlib
import importlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from catversion_jax.config import Config
from catversion_jax.methods.model_names import public_name
from catversion_jax.training.metric_writer import MetricRow
from catversion_jax.training.run_dir import RunDir
from catversion_jax.utils.errors import UserError, short
from catversion_jax.utils.files import read_text, write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import make_folder
from catversion_jax.utils.types import UInt8

PROJECT = "catversion"
"""The project of a run, unless the environment names one (WANDB_PROJECT, TRACKIO_PROJECT)."""
MOST_BYTES = 100
"""Of the file of an id."""
TRACKERS: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    # What it would send along otherwise: the command and its folder, the host, the packages and what is printed.
    "wandb": lambda package, run_id: {
        "id": run_id,
        "settings": package.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_save_requirements=False
        ),
    },
    "trackio": lambda package, run_id: {},
}
"""Packages with one interface (init, log, Image and finish), and what each takes beyond it for a run of an id."""


class Tracker(Protocol):
    """Is told of a training while it runs."""

    def row(self, row: MetricRow) -> None:
        """Takes what was measured after a step."""

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Takes an image that was sampled after a step."""


class EachStep(NamedTuple):
    """Calls a function after each step."""

    function: Callable[[MetricRow], object]

    def row(self, row: MetricRow) -> None:
        if row.loss is not None:
            self.function(row)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        pass


class TrackedRun:
    """A run in one of TRACKERS. If that fails once the run was begun, the training goes on without it."""

    def __init__(self, name: str, config: Config, title: str, run_id: str):
        """Begins the run of an id, or goes on with it.

        Raises UserError if the package is missing or refuses to begin.
        """
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track={name}: {name} is not installed; pip install {name}")
        self._name, self._package, self._failed = name, importlib.import_module(name), False
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        try:
            more = TRACKERS[name](self._package, run_id)
            # trackio knows a run by its name alone.
            shown = f"{title}-{run_id[:4]}"
            self._package.init(project=project, name=shown, config=shared_config(config), resume="allow", **more)
        except Exception as error:  # of any type, as they are another program's
            raise UserError(f"--track={name}: not begun ({short(error)}); mend that, or leave it out") from error

    def row(self, row: MetricRow) -> None:
        self._tell(lambda: self._package.log(row.scalars(), step=row.step))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        self._tell(lambda: self._package.log({name: self._package.Image(image)}, step=step))

    def finish(self) -> None:
        self._tell(self._package.finish)

    def _tell(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            warn(f"--track={self._name}: told nothing from here on ({short(error)}); metrics.jsonl has everything")


@contextlib.contextmanager
def tracked(names: Sequence[str], config: Config, run: RunDir) -> Iterator[list[TrackedRun]]:
    """Begins the runs that `names` asks for, and finishes them at the end of the context.

    The run's folder keeps their id, so that the parts of an interrupted run are one, and another run is another one.
    """
    if not names:  # a bucket is asked nothing
        yield []
        return
    stored = read_text(run.tracked, MOST_BYTES, "expected an id; remove it").strip() if run.tracked.is_file() else ""
    run_id = stored or uuid.uuid4().hex[:16]
    with contextlib.ExitStack() as stack:
        runs = []
        for name in dict.fromkeys(names):
            runs.append(TrackedRun(name, config, run.path.name, run_id))
            stack.callback(runs[-1].finish)
        if not stored:
            make_folder(run.path)
            write_atomically(run.tracked, lambda path: path.write_text(f"{run_id}\n"))
        yield runs


def shared_config(config: Config) -> dict[str, Any]:
    """Returns the config as it may be shared: without folders of the person's machine."""
    values = config.identity()
    return values | {"data.dir": "", "data.masks_dir": "", "model.path": public_name(config.model.path)}
