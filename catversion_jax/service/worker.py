"""The worker: the one thread that has the device. It takes turns between training and drawing, so that neither starves.

What it does is in learning.py and drawing.py; here is only when.
"""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax

from catversion_jax.service.drawing import Drawing, Drawings
from catversion_jax.service.learning import Learning
from catversion_jax.service.problems import is_full
from catversion_jax.service.requests import DONE, REMOVING
from catversion_jax.service.shares import Shares
from catversion_jax.service.store import Store
from catversion_jax.service.trainer import TrainingEndedError
from catversion_jax.training.turn import Snapshot
from catversion_jax.utils.errors import UserError, one_line
from catversion_jax.utils.log import warn

TRAIN, DRAW, REST = "train", "draw", "rest"
"""What the worker spends its time on; the rest is what it does between two turns."""
IDLE = 0.2
"""Seconds after which a worker without work looks into the store, if nobody wakes it before."""
AFTER_FAILURE = 2.0
"""Seconds until something is tried again that the disk refused."""


@contextmanager
def without_collections() -> Iterator[None]:
    """Collects no garbage inside, where tracing makes millions of objects that stay, and none of these ever after."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


class Worker(threading.Thread):
    """Learns and draws what the store holds, until it is stopped."""

    def __init__(self, store: Store, drawings: Drawings, set_up: Callable[[], Learning], drawing_share: float):
        """`set_up` makes the learning half, in the worker's own thread: it compiles."""
        super().__init__(name="worker", daemon=True)
        self.store, self.drawings, self._set_up = store, drawings, set_up
        self.learning: Learning | None = None
        self.ready = threading.Event()
        self.problem: str | None = None  # of the storage, while there is one
        self.failure: BaseException | None = None  # which ended the worker
        self.spent = dict.fromkeys((TRAIN, DRAW, REST), 0.0)  # seconds, without those that it was idle
        self._shares = Shares({TRAIN: 1 - drawing_share, DRAW: drawing_share})
        self._wake, self._stopping = threading.Event(), threading.Event()

    def wake(self) -> None:
        """Says that there is something new in the store."""
        self._wake.set()

    def stop(self) -> None:
        """Lets the worker save the states and end, after its turn."""
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        try:
            with without_collections():
                self.learning = learning = self._set_up()
                if not self._stopping.is_set():
                    self.warm_up(learning)
            self.show_again(learning)
            self.ready.set()
            while not self._stopping.is_set():
                self.turn(learning)
            learning.close()
        # Whatever it is: without its worker the server has to end, and to say why.
        except TrainingEndedError as error:
            self.failure = error.__cause__
        except Exception as error:
            self.failure = error
        finally:
            self.ready.clear()

    def warm_up(self, learning: Learning) -> None:
        """Compiles the step and the sampler, so that nobody waits for that."""
        learning.trainer.compile()
        concept, sampler = learning.untrained(), learning.config.sample.sampler
        if jax.default_backend() == "cpu":  # where each step is a dispatch of the same program
            sampler = replace(sampler, steps=min(sampler.steps, 2))
        # In one batch, as a picture with a concept and one without may share it.
        drawings = [Drawing("a photo of a thing", 0, sampler, concepts, Path()) for concepts in ((), (concept,))]
        self.drawings.warm_up(drawings)

    def show_again(self, learning: Learning) -> None:
        """Queues the previews of the concepts that were done, and had none yet, when the last server ended."""
        for entry in self.store.with_status("concepts", [DONE]):
            if entry.previewed:
                continue
            try:
                concept = self.store.load_concept(entry.id)
                self.drawings.show(Snapshot(entry.id, concept.steps, concept, learning.config_of(entry)))
            except UserError as error:  # of a damaged file, for example
                warn(f"concept {entry.id}: no previews: {error}")
                self.store.set_previewed(entry.id)

    def turn(self, learning: Learning) -> None:
        """Does what is to be done next. A disk that is full or broken is waited for: nothing is lost meanwhile."""
        begun = time.monotonic()
        try:
            self.remove_asked(learning)
            for snapshot in learning.settle():
                self.drawings.show(snapshot)
            learning.admit()
            waits = {TRAIN: learning.trainer.is_busy, DRAW: self.drawings.waiting()}
            kind = self._shares.next([kind for kind, does in waits.items() if does])
            if kind is None:
                self._wake.wait(IDLE)
                self._wake.clear()
            else:
                self.spent[REST] += time.monotonic() - begun
                begun = time.monotonic()
                self.work(kind, learning)
                took = time.monotonic() - begun
                self._shares.spent(kind, took)
                self.spent[kind] += took
            self.problem = None
        except Exception as error:
            if isinstance(error, TrainingEndedError) or not is_full(error):
                raise
            self.problem = one_line(str(error))
            warn(f"{self.problem}; tried again in {AFTER_FAILURE:g} seconds")
            self._stopping.wait(AFTER_FAILURE)

    def work(self, kind: str, learning: Learning) -> None:
        if kind == DRAW:
            self.drawings.draw()
            return
        # What has ended is written before the states are saved without it.
        for snapshot in [*learning.train(), *learning.settle()]:
            self.drawings.show(snapshot)
        learning.trainer.save_if_due()

    def remove_asked(self, learning: Learning) -> None:
        """Removes the concepts that are to be removed, wherever they are."""
        entries = self.store.with_status("concepts", [REMOVING])
        if entries:
            self.drawings.forget([entry.id for entry in entries])
            learning.remove(entries)
