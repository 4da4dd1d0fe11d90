"""The driver: starts a worker in every place of a Ray cluster, hands out the concepts, and notices who is lost.

Ray finds machines, starts processes there and says when they end. What is decided here is only which concept goes where
(work_queue.py), and when a worker that says nothing is given up.
"""

import secrets
import time
from dataclasses import dataclass
from typing import Any

from catversion_jax.fleet import cluster
from catversion_jax.fleet.cluster import Seat
from catversion_jax.fleet.home import Desk, Handed, Report
from catversion_jax.fleet.work_queue import TOGETHER, Hands, WorkQueue
from catversion_jax.fleet.worker import ConceptWorker, Setup
from catversion_jax.training.engine import ConceptJob
from catversion_jax.training.run_dir import OF_RAY
from catversion_jax.training.status import FAILED, ConceptStatus
from catversion_jax.utils.errors import ReportedError, UserError, short
from catversion_jax.utils.log import warn

LOOK = 1.0
"""Seconds between two looks at the cluster's nodes."""
NODE_LOSS, NODE_SILENCE = 10.0, 120.0
"""Seconds after which a worker's end is its own fault if its node is still alive: of one whose end Ray was told of, and
of one that is out of reach. Ray takes up to a minute to notice that a node is."""
IDLE = 30.0
"""Seconds after which a worker that has nothing to do is asked whether it is there."""
STARTING = 3600.0
"""Seconds that a worker has for its model and its compilation."""
LEAVING = 120.0
"""Seconds that workers have to save their states."""
STARTS = 3
"""Workers that may end in a place for no concept's sake, until it is left alone."""
START, TURN, LEAVE = "start", "turn", "leave"
"""The methods of a worker."""
CRASHED = "a worker crashed {} times with it, the last time with it alone ({})"


@dataclass
class RemoteWorker:
    """A worker, as the driver sees it."""

    name: str
    seat: Seat
    actor: Any
    doing: str = START
    call: Any = None  # Ray's reference to what it does now
    since: float = 0.0  # when that was asked for
    lost: float | None = None  # of one that is dead: until when its node may turn out to be lost, too
    told: str = ""  # how it ended
    silent: bool = False  # out of reach, rather than ended
    goes: bool = False  # its node is about to be taken away

    @property
    def is_free(self) -> bool:
        return self.call is None and self.lost is None


@dataclass(frozen=True)
class RayOptions:
    """Which cluster, and what is expected of its workers."""

    address: str
    needs: dict[str, float] | None = None  # of its node, for one worker; None: found by itself
    patience: float = 300.0  # seconds without a word, after which a worker is given up


class Fleet:
    """The workers of a run on a Ray cluster."""

    def __init__(self, ray: Any, setup: Setup, queue: WorkQueue[ConceptJob], options: RayOptions, desk: Desk):
        self.ray, self.setup, self.queue, self.options, self.desk = ray, setup, queue, options, desk
        self.workers: dict[str, RemoteWorker] = {}
        self.vain: dict[Seat, float] = {}  # workers that ended in a place without having ended a concept
        self._began = time.monotonic()
        self._looked = self._began - LOOK
        self._class = ray.remote(ConceptWorker)
        self._error: ReportedError | None = None
        self._ended: list[ConceptStatus] = []
        self._waits = False
        self._alive: set[str] = set()  # the ids of the nodes, by the last look

    @property
    def learning(self) -> int:
        """How many workers learn."""
        return sum(worker.doing == TURN for worker in self.workers.values())

    def work(self) -> list[ConceptStatus]:
        """Lets the workers learn for about a second; returns the concepts that ended.

        Raises the error of the last worker if none can go on.
        """
        if time.monotonic() - self._looked >= LOOK:
            self._looked = time.monotonic()
            self.look()
        for worker in self.workers.values():
            if worker.is_free and worker.goes:
                self.ask(worker, LEAVE)
            elif worker.is_free:
                self.next_turn(worker)
        self.wait()
        for worker in list(self.workers.values()):
            limit = STARTING if worker.doing == START else self.options.patience
            if worker.call is not None and time.monotonic() - worker.since > limit:
                self.lose(worker, f"said nothing for {limit:g} s", crashed=True)
        return self.taken()

    def taken(self) -> list[ConceptStatus]:
        """Returns the concepts that ended since it was asked before."""
        ended, self._ended = self._ended, []
        return ended

    def wait(self) -> None:
        """Waits up to a second for what a worker says."""
        calls = {worker.call: worker for worker in self.workers.values() if worker.call is not None}
        if not calls:
            time.sleep(LOOK / 4)
            return
        self.ray.wait(list(calls), num_returns=1, timeout=LOOK)
        # All that have ended: whoever has not is measured by his patience next.
        ready, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in ready:
            self.hear(calls[call])

    def leave(self) -> list[ConceptStatus]:
        """Lets the workers save their states, and ends them; returns the concepts that ended meanwhile."""
        until = time.monotonic() + LEAVING
        while self.workers and time.monotonic() < until:
            for worker in list(self.workers.values()):
                if worker.doing == START or worker.lost is not None:
                    self.forget(worker)
                elif worker.is_free:
                    self.ask(worker, LEAVE)
            self.wait()
        for worker in list(self.workers.values()):
            warn(f"{worker.seat.node}: a worker did not save its states in {LEAVING:g} s")
            self.forget(worker)
        return self.taken()

    def look(self) -> None:
        """Looks who is there: a place without a worker gets one, and what a lost worker had is handed to others."""
        self.desk.check()
        try:
            nodes = cluster.alive_nodes(self.ray)
        except self.ray.exceptions.RayError as error:  # its head is slow; asked again
            warn(f"the cluster does not say which nodes it has ({cluster.last_line(error)})")
            return
        self._alive = alive = {node.id for node in nodes}
        places = cluster.seats(nodes, self.options.needs)
        for worker in list(self.workers.values()):
            is_alive = worker.seat.node_id in alive
            if worker.lost is None:
                worker.goes = not is_alive
                self.rest(worker)
            # Ray may not have noticed yet that the node is lost, too.
            elif not is_alive:
                self.lose(worker, "was lost with its node", crashed=False)
            elif time.monotonic() > worker.lost:
                self.lose(worker, f"ended ({worker.told})", crashed=not worker.silent)
        taken = {worker.seat for worker in self.workers.values()}
        for seat, needs in places.items():
            if seat not in taken and self.vain.get(seat, 0) < STARTS:
                self.start(seat, needs)
        if places and not self.workers and self._error is not None:
            raise self._error
        if not self.workers and not self._waits:
            warn("no node of the cluster has a place for a worker yet; waiting for one")
        self._waits = not self.workers

    def start(self, seat: Seat, needs: dict[str, float]) -> None:
        name = f"{seat.node}-{seat.number}-{secrets.token_hex(3)}{OF_RAY}"
        actor = self._class.options(**cluster.options(seat, needs, name)).remote(
            name, seat.node, cluster.environment(needs), self.setup
        )
        self.workers[name] = RemoteWorker(name, seat, actor)
        self.ask(self.workers[name], START)

    def next_turn(self, worker: RemoteWorker) -> None:
        """Hands a worker its next concepts, and lets it learn; one that has none waits."""
        waited = time.monotonic() - self._began
        handed = [Handed(task.job, waited, self.desk.given(task)) for task in self.queue.hand(worker.name)]
        cancelled = self.queue.take_cancelled(worker.name)
        # One that has nothing to do is asked now and then whether it is still there.
        is_idle = time.monotonic() - worker.since > IDLE
        if self.queue.hands[worker.name].tasks or cancelled or is_idle:
            self.ask(worker, TURN, handed, self.queue.to_return(worker.name), cancelled)

    def ask(self, worker: RemoteWorker, what: str, *arguments: Any) -> None:
        worker.doing, worker.since = what, time.monotonic()
        worker.call = getattr(worker.actor, what).remote(*arguments)

    def hear(self, worker: RemoteWorker) -> None:
        """Takes a worker's report in."""
        try:
            report: Report = self.ray.get(worker.call)
        except self.ray.exceptions.RayActorError as error:
            worker.silent = isinstance(error, self.ray.exceptions.ActorUnavailableError)
            worker.call, worker.told = None, short(error)
            worker.lost = time.monotonic() + (NODE_SILENCE if worker.silent else NODE_LOSS)
            self.rest(worker)
            return
        # Whatever it raised: the worker may be in any state.
        except self.ray.exceptions.RayError as error:
            self.lose(worker, f"failed ({cluster.last_line(error)})", crashed=True)
            return
        worker.call = None
        for message in report.warnings:
            warn(f"{worker.seat.node}: {message}")
        if report.error is not None:
            self._error = report.error
            if worker.doing == START and isinstance(report.error, UserError):  # another there would make it, too
                self.vain[worker.seat] = STARTS
            self.lose(worker, str(report.error), crashed=False)
        elif worker.doing == LEAVE:
            self.desk.take(report)
            self.queue.leave(worker.name)
            self.forget(worker)
        elif worker.doing == START:
            worker.doing = TURN
            self.queue.join(worker.name, worker.seat.node_id)
        else:
            ended = [ended.status for ended in report.turn.ended]
            self.desk.take(report)
            self.queue.heard(worker.name, [status.id for status in ended], report.begun, report.returned)
            self._ended += ended
            if ended:
                self.vain.pop(worker.seat, None)

    def lose(self, worker: RemoteWorker, why: str, crashed: bool) -> None:
        """Gives a worker up; what it had goes to others, or has failed."""
        had = self.queue.hands.get(worker.name)
        if had is not None:
            self.take_results(worker.name, had)
        warn(f"{worker.seat.node}: a worker {why}" + ("; what it had goes to others" if had and had.tasks else ""))
        if worker.seat.node_id in self._alive:
            # Half, where one of its concepts may be the reason.
            self.vain[worker.seat] = self.vain.get(worker.seat, 0) + (0.5 if had and had.tasks and crashed else 1)
            self._error = self._error or UserError(f"{worker.seat.node}: a worker {why}")
            if self.vain[worker.seat] >= STARTS:
                warn(f"{worker.seat.node}: no more workers are started in this place")
        if had is not None and crashed:
            for job in self.queue.crashed(worker.name):
                error = CRASHED.format(len(TOGETHER), worker.told or why)
                status = ConceptStatus(job.id, FAILED, error, digest=job.digest)
                self.desk.fail(status)
                self._ended.append(status)
        elif had is not None:
            self.queue.leave(worker.name)
        self.forget(worker)

    def take_results(self, name: str, had: Hands[ConceptJob]) -> None:
        """Takes in what a worker that is lost had written, and not reported any more."""
        found = self.desk.written([task.job for task in had.tasks.values()])
        self.queue.heard(name, [status.id for status in found], had.begun, [])
        self._ended += found

    def rest(self, worker: RemoteWorker) -> None:
        """Hands a worker no more while it is dead, or about to leave."""
        if worker.name in self.queue.hands:
            self.queue.hands[worker.name].rests = worker.goes or worker.lost is not None

    def forget(self, worker: RemoteWorker) -> None:
        # A process that hangs, or whose node is out of reach, may not end by itself.
        self.ray.kill(worker.actor)
        del self.workers[worker.name]
