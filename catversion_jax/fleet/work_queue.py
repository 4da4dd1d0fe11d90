"""Which worker learns which concept: one queue for all, without a clock and without a network.

A worker is handed as many concepts as it has slots, and as many again to prepare. What a lost worker had goes to
others. If its process crashed, rather than its machine being lost, one of its concepts may be the reason: they are then
tried a few together, then each alone, and the one with which a worker crashes a third time has failed.
"""

import itertools
import math
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
    crashed_on: frozenset[str] = frozenset()  # the nodes of those
    saved_by: tuple[str, ...] = ()  # the folders of checkpoints that may have its state; a worker's has its name
    returned_by: str = ""  # the worker that handed it back for others to begin


@dataclass
class Hands(Generic[JobT]):
    """What a worker was handed, and has not ended."""

    node: str
    tasks: dict[str, Task[JobT]] = field(default_factory=dict)  # by id
    rests: bool = False  # it takes no more: it is dead, perhaps, or about to leave
    begun: set[str] = field(default_factory=set)  # those in its slots, by what it said last
    cancelled: list[str] = field(default_factory=list)  # those that it has still, and is to drop

    @property
    def crashes(self) -> int:
        return max((task.crashes for task in self.tasks.values()), default=0)


class WorkQueue(Generic[JobT]):
    """The concepts that wait, and those that workers have."""

    def __init__(self, jobs: Iterator[JobT], slots: int, saved: Mapping[str, tuple[str, ...]] | None = None):
        """`jobs` is read as they are handed out. `saved` are the folders that hold its state, by id."""
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

    def add(self, job: JobT) -> None:
        """Adds a concept after all others."""
        self._waiting[0].append(Task(job))

    def cancel(self, concept_id: str) -> None:
        """Takes a concept out, wherever it is."""
        for crashes, waiting in self._waiting.items():
            self._waiting[crashes] = deque(task for task in waiting if task.job.id != concept_id)
        for hands in self.hands.values():
            if hands.tasks.pop(concept_id, None) is not None:
                hands.cancelled.append(concept_id)

    def take_cancelled(self, worker: str) -> list[str]:
        """Returns, once, what a worker is to drop."""
        hands = self.hands[worker]
        cancelled, hands.cancelled = hands.cancelled, []
        return cancelled

    def join(self, worker: str, node: str) -> None:
        """Adds a worker on a node."""
        self.hands[worker] = Hands(node)

    def hand(self, worker: str) -> list[Task[JobT]]:
        """Returns the next concepts for a worker."""
        hands = self.hands[worker]
        crashes = hands.crashes
        if not crashes and (suspected := self._suspected(hands.node)):
            if hands.tasks and worker == self._next_free(suspected):
                return []  # until it has ended what it has: it is to try what others crashed with
            if not hands.tasks:
                crashes = suspected
        # Towards the end nobody prepares what another could begin.
        whole = self._slots * (1 if self._next is None else 2)
        most = min(TOGETHER[crashes] or whole, whole)
        if self._next is None and not crashes:
            most = min(most, self._share())
        room = most - len(hands.tasks)
        handed = list(itertools.islice(self._take(crashes, worker), max(0, room)))
        hands.tasks |= {task.job.id: task for task in handed}
        return handed

    def _share(self) -> int:
        """Returns how many concepts each worker with empty slots has if what waits is shared evenly by them."""
        counts = [len(hands.tasks) for hands in self.hands.values() if not hands.rests]
        free = [count for count in counts if count < self._slots]
        return math.ceil((len(self._waiting[0]) + sum(free)) / max(1, len(free)))

    def _take(self, crashes: int, worker: str) -> Iterator[Task[JobT]]:
        waiting = self._waiting[crashes]
        node, others_are_free = self.hands[worker].node, self._free_slots(worker) > 0
        for task in list(waiting):
            if crashes and not self._may_try(task, node):
                continue
            if crashes or task.returned_by != worker or not others_are_free:
                waiting.remove(task)
                yield task
        while not crashes and self._next is not None:
            job, self._next = self._next, next(self._jobs, None)
            yield Task(job, saved_by=self._saved.pop(job.id, ()))

    def _may_try(self, task: Task[JobT], node: str) -> bool:
        """Whether a node may try a concept: not one where it crashed, which may be at fault, while there are others."""
        nodes = {hands.node for hands in self.hands.values() if not hands.rests}
        return node not in task.crashed_on or nodes <= task.crashed_on

    def _suspected(self, node: str) -> int:
        """Returns the most crashes of a concept that waits and that a node may try; 0 if there is none."""
        may_try = (n for n, tasks in self._waiting.items() if any(self._may_try(task, node) for task in tasks))
        return max(may_try, default=0)

    def _next_free(self, crashes: int) -> str | None:
        """Returns the worker that will first have ended what it has, of those that may try what others crashed with."""
        able = {
            name: len(hands.tasks)
            for name, hands in self.hands.items()
            if not hands.rests and any(self._may_try(task, hands.node) for task in self._waiting[crashes])
        }
        return min(able, key=able.__getitem__, default=None)

    def _free_slots(self, worker: str) -> int:
        """Returns how many concepts others than a worker could begin at once."""
        return sum(
            max(0, self._slots - len(hands.tasks))
            for name, hands in self.hands.items()
            if name != worker and not hands.rests and not hands.crashes
        )

    def to_return(self, worker: str) -> int:
        """Returns how many concepts do not fit into a worker's slots, and others could begin at once."""
        hands = self.hands[worker]
        # What others crashed with stays where it is: not everybody may try it.
        if self._next is not None or self._is_waiting or hands.crashes:
            return 0
        return min(self._free_slots(worker), max(0, len(hands.tasks) - self._slots))

    def heard(self, worker: str, ended: Collection[str], begun: Collection[str], returned: Collection[str]) -> None:
        """Notes what a worker says: the ids of those that ended, that are in its slots, and that it hands back."""
        hands = self.hands[worker]
        # What was cancelled meanwhile is not among its tasks any more.
        for concept_id in ended:
            hands.tasks.pop(concept_id, None)
        for concept_id in [concept_id for concept_id in returned if concept_id in hands.tasks]:
            task = hands.tasks.pop(concept_id)
            task.returned_by = worker
            self._waiting[task.crashes].append(task)
        hands.begun = set(begun)

    def leave(self, worker: str) -> None:
        """Takes back what a worker had that has left, or was lost with its machine."""
        for task in self.hands.pop(worker).tasks.values():
            task.saved_by += (worker,)
            self._waiting[task.crashes].append(task)

    def crashed(self, worker: str) -> list[JobT]:
        """Takes back what a worker had that crashed; returns what has failed by that."""
        failed, hands = [], self.hands.pop(worker)
        for task in hands.tasks.values():
            task.crashes += 1
            task.crashed_on |= {hands.node}
            task.saved_by += (worker,)
            if task.crashes == len(TOGETHER):
                failed.append(task.job)
            else:
                self._waiting[task.crashes].append(task)
        return failed
