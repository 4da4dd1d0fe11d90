"""Draws docs/fleet.png: ten thousand concepts on 64 spot machines, by fixed parts and by the queue of --ray.

    python docs/fleet.py

No machine is rented: hosts come and go by the clock of a simulation, and the queue is the one that runs
(catversion_jax/fleet/work_queue.py). Prints the table of docs/batch.md.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from catversion_jax.fleet.work_queue import WorkQueue
from catversion_jax.utils.markdown import table

CONCEPTS, STEPS, HOSTS, SLOTS = 10_000, 1000, 64, 16
STEP = 0.1705
"""Seconds of a step of 16 concepts x 2 photos on an H100 (docs/performance.md)."""
START = 135.0
"""Seconds from a process's start to its first step, from an empty compilation cache, on an H200 (docs/serve.md)."""
SLOW, SLOWNESS = 4, 2.0
"""So many of the hosts take so many times as long for a step: stated, not measured, as are the next two."""
AWAY = 600.0
"""Mean seconds until a machine that was taken away is replaced."""
HOURS = (None, 8.0, 4.0, 2.0, 1.0, 0.5)
"""Mean hours until a machine is taken away, without notice; None: never."""
EVERY = 100
"""Steps between checkpoints."""
SEEDS = 10


class Job(NamedTuple):
    id: str


@dataclass
class Host:
    """A machine, which comes and goes."""

    number: int
    step: float  # seconds
    life: int = 0  # how often it was replaced
    here: float | None = None  # since when; None: it is away
    begun: float = 0.0  # when its slots began to learn
    clock: int = 0  # steps since then
    left: dict[str, int] = field(default_factory=dict)  # steps of the concepts in its slots
    waiting: list[str] = field(default_factory=list)  # handed, and not begun

    @property
    def name(self) -> str:
        return f"{self.number}.{self.life}"


class Outcome(NamedTuple):
    hours: float  # until the last concept is done
    lost: float  # concept-hours: of slots of machines that were there, and learned nothing that stayed


class Fleet:
    """The machines, and the queue, or the queues, that they take from."""

    def __init__(self, mean_hours: float | None, seed: int, queue_of: Callable[[int], WorkQueue[Job]]):
        self.rng, self.mean, self.queue_of = random.Random(seed), mean_hours, queue_of
        slow = self.rng.sample(range(HOSTS), SLOW)
        self.hosts = [Host(i, STEP * (SLOWNESS if i in slow else 1)) for i in range(HOSTS)]
        self.events: list[tuple[float, int, str, int]] = []
        self.steps = Counter[str]()  # saved, by concept
        self.done, self.held = 0, 0.0  # concepts; seconds that machines were there

    def run(self) -> Outcome:
        for host in self.hosts:
            self.arrive(host, 0.0)
        now = 0.0
        while self.done < CONCEPTS:
            now, number, what, life = heapq.heappop(self.events)
            host = self.hosts[number]
            if what == "arrive":
                self.arrive(host, now)
            elif life == host.life:
                {"learn": self.learn, "leave": self.leave}[what](host, now)
        self.held += sum(now - host.here for host in self.hosts if host.here is not None)
        useful = sum(STEPS * STEP for _ in range(CONCEPTS))
        return Outcome(now / 3600, (self.held * SLOTS - useful) / 3600)

    def plan(self, when: float, host: Host, what: str) -> None:
        heapq.heappush(self.events, (when, host.number, what, host.life))

    def arrive(self, host: Host, now: float) -> None:
        host.life, host.here, host.begun, host.clock = host.life + 1, now, now + START, 0
        self.queue_of(host.number).join(host.name, host.name)
        self.plan(now + START, host, "learn")
        if self.mean is not None:
            self.plan(now + self.rng.expovariate(1 / (3600 * self.mean)), host, "leave")

    def leave(self, host: Host, now: float) -> None:
        """Takes a machine away: the steps since its last checkpoint are lost."""
        self.advance(host, now)
        since = host.clock % EVERY
        for concept_id, left in host.left.items():
            self.steps[concept_id] = max(self.steps[concept_id], STEPS - left - since)
        self.queue_of(host.number).leave(host.name)
        self.held += now - (host.here or 0.0)
        host.here, host.left, host.waiting = None, {}, []
        host.life += 1
        self.plan(now + self.rng.expovariate(1 / AWAY), host, "arrive")

    def advance(self, host: Host, now: float) -> None:
        """Takes the steps that a machine has had time for."""
        clock = max(host.clock, int((now - host.begun) / host.step + 1e-6)) if host.left else host.clock
        host.left = {concept_id: left - (clock - host.clock) for concept_id, left in host.left.items()}
        host.clock = clock

    def learn(self, host: Host, now: float) -> None:
        """Ends the concepts that have taken their steps, and fills the slots again."""
        self.advance(host, now)
        queue, ended = self.queue_of(host.number), [one for one, left in host.left.items() if left <= 0]
        self.done += len(ended)
        for concept_id in ended:
            del host.left[concept_id]
        back = queue.to_return(host.name)
        returned = host.waiting[::-1][:back]
        host.waiting = host.waiting[: len(host.waiting) - len(returned)]
        queue.heard(host.name, ended, host.left, returned)
        host.waiting += [task.job.id for task in queue.hand(host.name)]
        if not host.left:
            host.begun, host.clock = now, 0
        while host.waiting and len(host.left) < SLOTS:
            concept_id = host.waiting.pop(0)
            host.left[concept_id] = STEPS - self.steps[concept_id]
        # One that has nothing looks again: another may be taken away.
        wait = min(host.left.values()) * host.step if host.left else 5.0
        when = host.begun + (host.clock + min(host.left.values())) * host.step if host.left else now + wait
        self.plan(when, host, "learn")


def by_parts(mean_hours: float | None, seed: int) -> Outcome:
    """Each machine, and whichever replaces it, has its own part of the manifest."""
    jobs = [iter([Job(str(i)) for i in range(number, CONCEPTS, HOSTS)]) for number in range(HOSTS)]
    queues = [WorkQueue(mine, SLOTS) for mine in jobs]
    return Fleet(mean_hours, seed, lambda number: queues[number]).run()


def by_queue(mean_hours: float | None, seed: int) -> Outcome:
    """All machines take from one queue."""
    queue = WorkQueue(iter([Job(str(i)) for i in range(CONCEPTS)]), SLOTS)
    return Fleet(mean_hours, seed, lambda _: queue).run()


WAYS = {"fixed parts": by_parts, "one queue": by_queue}


def main() -> None:
    found = {
        way: np.array([[run(hours, seed) for seed in range(SEEDS)] for hours in HOURS]) for way, run in WAYS.items()
    }
    labels = ["never" if hours is None else f"{hours:g} h" for hours in HOURS]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for column, (axis, title) in enumerate(zip(axes, ("hours to finish", "concept-hours lost"), strict=True)):
        for way, values in found.items():
            mean, spread = values[:, :, column].mean(1), values[:, :, column].std(1)
            axis.errorbar(labels, mean, spread, label=way, marker="o", capsize=3)
        axis.set(title=title, xlabel="a machine is taken away after", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(Path(__file__).with_name("fleet.png"), dpi=110)
    rows = [
        [label, *(f"{found[way][i, :, column].mean():.2f}" for column in (0, 1) for way in WAYS)]
        for i, label in enumerate(labels)
    ]
    head = ["taken away after", *(f"{what}, {way}" for what in ("hours", "concept-hours lost") for way in WAYS)]
    print(table(head, rows))


if __name__ == "__main__":
    main()
