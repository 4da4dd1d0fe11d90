"""A fleet in a thread of its own, for a server that draws meanwhile."""

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from catversion_jax.fleet.cluster import last_line
from catversion_jax.fleet.driver import Fleet, RayOptions
from catversion_jax.fleet.home import Report
from catversion_jax.fleet.server_home import ServerDesk
from catversion_jax.fleet.work_queue import WorkQueue
from catversion_jax.fleet.worker import Setup
from catversion_jax.training.engine import ConceptJob
from catversion_jax.training.interrupted import InterruptedConcept
from catversion_jax.training.state import ConceptData
from catversion_jax.utils.errors import StorageError


class FleetThread(threading.Thread):
    """Drives workers until it is stopped. What they report waits in `reports`; whoever takes one removes it."""

    def __init__(self, ray: Any, options: RayOptions):
        super().__init__(name="fleet", daemon=True)
        self._ray, self._options = ray, options
        self.on_news: Callable[[], object] = lambda: None
        """Called when there are reports, and when the thread ends."""
        self.learning = 0  # workers
        self.failure: Exception | None = None  # which ended the thread
        self._orders: deque[Callable[[], object]] = deque()
        self._stopping = threading.Event()

    def begin(self, setup: Setup, saved: Mapping[str, InterruptedConcept]) -> None:
        """Starts the thread, and a worker in every place; concepts in `saved` go on from their states."""
        self._desk = ServerDesk(self._ray, saved)
        self._queue: WorkQueue[ConceptJob] = WorkQueue(iter(()), setup.config.batch.slots)
        self._fleet = Fleet(self._ray, setup, self._queue, self._options, self._desk)
        self.start()

    @property
    def reports(self) -> deque[Report]:
        return self._desk.reports

    def enter(self, job: ConceptJob, data: ConceptData) -> None:
        """Has a concept learned."""
        self._orders.append(partial(self._enter, job, data))

    def _enter(self, job: ConceptJob, data: ConceptData) -> None:
        self._desk.accept(job, data)
        self._queue.add(job)

    def cancel(self, ids: Collection[str]) -> None:
        """Forgets concepts, and all that was learned of them; those that the workers have leave their slots."""
        self._orders.append(partial(self._cancel, ids))

    def _cancel(self, ids: Collection[str]) -> None:
        for concept_id in ids:
            self._queue.cancel(concept_id)
        self._desk.forget(ids)

    def stop(self) -> None:
        """Lets the workers send their states, and ends them and the thread, if it was ever begun."""
        self._stopping.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        try:
            self._drive()
        except self._ray.exceptions.RayError as error:
            self.failure = StorageError(f"--ray: the cluster failed ({last_line(error)}); the same command goes on")
        # Whatever it is: without its workers the server has to end, and to say why.
        except Exception as error:
            self.failure = error
        self.learning = 0
        self.on_news()

    def _drive(self) -> None:
        try:
            while not self._stopping.is_set():
                while self._orders:
                    self._orders.popleft()()
                self._fleet.work()
                self.learning = self._fleet.learning
                if self.reports:
                    self.on_news()
        finally:
            self._fleet.leave()
