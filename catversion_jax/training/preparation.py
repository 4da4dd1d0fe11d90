"""The concepts that come next: prepared in a thread, so that the devices do not wait for photos to be read."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

JobT = TypeVar("JobT")
DataT = TypeVar("DataT")


class Prepared(NamedTuple, Generic[JobT, DataT]):
    """A job, and its data or what went wrong."""

    job: JobT
    data: Future[DataT]


class Preparation(Generic[JobT, DataT]):
    """A queue of jobs, in which at most `most` are: memory on the host does not grow with what waits elsewhere."""

    def __init__(self, prepare: Callable[[JobT], DataT], most: int):
        self._prepare, self._most = prepare, most
        self._pool = ThreadPoolExecutor(1, "preparation")
        self._waiting: deque[Prepared[JobT, DataT]] = deque()

    @property
    def room(self) -> int:
        """How many jobs may be added now."""
        return self._most - len(self._waiting)

    @property
    def jobs(self) -> list[JobT]:
        """The jobs in the queue, the next one first."""
        return [prepared.job for prepared in self._waiting]

    def drop(self, unwanted: Callable[[JobT], bool]) -> None:
        """Takes jobs out of the queue, whether they are prepared or not."""
        for prepared in self._waiting:
            if unwanted(prepared.job):
                prepared.data.cancel()
        self._waiting = deque(prepared for prepared in self._waiting if not unwanted(prepared.job))

    def add(self, job: JobT) -> None:
        """Adds a job, which is prepared after those before it."""
        self._waiting.append(Prepared(job, self._pool.submit(self._prepare, job)))

    def take(self, wait: bool) -> Prepared[JobT, DataT] | None:
        """Returns the next job that is prepared; None if there is none, or if it is not ready and not to `wait` for."""
        if not self._waiting or not (wait or self._waiting[0].data.done()):
            return None
        return self._waiting.popleft()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
