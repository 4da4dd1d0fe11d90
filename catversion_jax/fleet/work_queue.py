"""Which worker learns which concept: one queue for all, without a clock and without a network.

A worker is handed as many concepts as it has slots, and as many again to prepare. What a lost worker had goes to
others. If its process crashed, rather than its machine being lost, one of its concepts may be the reason: they are then
tried a few together, then each alone, and the one with which a worker crashes a third time has failed.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

TOGETHER = (None, 4, 1)
"""How many concepts a worker learns at once that have seen so many crashes; None: all that it is handed."""


class HasId(Protocol):
    @property
    def id(self) -> str: ...


JobT = TypeVar("JobT", bound=HasId)


@dataclass
class Task(Generic[JobT]):
    """A concept to learn."""

    job: JobT
    crashes: int = 0  # of workers that had it
    saved_by: tuple[str, ...] = ()  # the workers whose checkpoints may have its state


@dataclass
class Hands(Generic[JobT]):
    """What a worker was handed, and has not ended."""

    tasks: dict[str, Task[JobT]] = field(default_factory=dict)  # by id
    begun: set[str] = field(default_factory=set)  # those in its slots, by what it said last

    @property
    def crashes(self) -> int:
        return max((task.crashes for task in self.tasks.values()), default=0)


class WorkQueue(Generic[JobT]):
    """The concepts that wait, and those that workers have."""

    def __init__(self, jobs: Iterator[JobT], slots: int, saved: Mapping[str, tuple[str, ...]] | None = None):
        """`jobs` is read as they are handed out. `saved` are the workers whose checkpoints hold a job, by id."""
        self._jobs, self._slots, self._saved = jobs, slots, dict(saved or {})
        self._waiting: defaultdict[int, deque[Task[JobT]]] = defaultdict(deque)  # handed back, by crashes
        self.hands: dict[str, Hands[JobT]] = {}  # by worker
        self._next = next(jobs, None)

    @property
    def is_over(self) -> bool:
        return self._next is None and not self._is_waiting and not any(hands.tasks for hands in self.hands.values())

    @property
    def _is_waiting(self) -> bool:
        return any(self._waiting.values())

    def join(self, worker: str) -> None:
        """Adds a worker."""
        self.hands[worker] = Hands()

    def hand(self, worker: str) -> list[Task[JobT]]:
        """Returns the next concepts for a worker."""
        hands = self.hands[worker]
        if not hands.tasks and (suspected := max((n for n, tasks in self._waiting.items() if n and tasks), default=0)):
            crashes = suspected
        else:
            crashes = hands.crashes
        # Towards the end nobody prepares what another could begin.
        whole = self._slots * (1 if self._next is None else 2)
        room = min(TOGETHER[crashes] or whole, whole) - len(hands.tasks)
        handed = list(itertools.islice(self._take(crashes), max(0, room)))
        hands.tasks |= {task.job.id: task for task in handed}
        return handed

    def _take(self, crashes: int) -> Iterator[Task[JobT]]:
        while True:
            if waiting := self._waiting[crashes]:
                yield waiting.popleft()
            elif not crashes and self._next is not None:
                job, self._next = self._next, next(self._jobs, None)
                yield Task(job, saved_by=self._saved.pop(job.id, ()))
            else:
                return

    def to_return(self, worker: str) -> int:
        """Returns how many of the concepts that a worker has not begun others could begin at once."""
        if self._next is not None or self._is_waiting:
            return 0
        hands = self.hands[worker]
        free = sum(max(0, self._slots - len(other.tasks)) for name, other in self.hands.items() if name != worker)
        return min(free, max(0, len(hands.tasks) - max(len(hands.begun), 1))) if len(hands.tasks) > 1 else 0

    def heard(self, worker: str, ended: Collection[str], begun: Collection[str], returned: Collection[str]) -> None:
        """Notes what a worker says: the ids of those that ended, that are in its slots, and that it hands back."""
        hands = self.hands[worker]
        for concept_id in ended:
            del hands.tasks[concept_id]
        for concept_id in returned:
            task = hands.tasks.pop(concept_id)
            self._waiting[task.crashes].append(task)
        hands.begun = set(begun)

    def leave(self, worker: str) -> None:
        """Takes back what a worker had that has left, or was lost with its machine."""
        for task in self.hands.pop(worker).tasks.values():
            task.saved_by += (worker,)
            self._waiting[task.crashes].append(task)

    def crashed(self, worker: str) -> list[JobT]:
        """Takes back what a worker had that crashed; returns what has failed by that."""
        failed = []
        for task in self.hands.pop(worker).tasks.values():
            task.crashes += 1
            task.saved_by += (worker,)
            if task.crashes == len(TOGETHER):
                failed.append(task.job)
            else:
                self._waiting[task.crashes].append(task)
        return failed
