"""A server: the service's threads around uvicorn, from its start to its last saved step."""

import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from catversion_jax.api.pipeline import Pipeline
from catversion_jax.config import Config
from catversion_jax.fleet.cluster import connected
from catversion_jax.fleet.driver import RayOptions
from catversion_jax.fleet.thread import FleetThread
from catversion_jax.service.app import make_app
from catversion_jax.service.drawing import Drawings
from catversion_jax.service.fleet_trainer import FleetTrainer, check_state_size
from catversion_jax.service.learning import Learning
from catversion_jax.service.requests import QUEUED
from catversion_jax.service.service import ConceptService, Rules
from catversion_jax.service.states import States
from catversion_jax.service.store import Store
from catversion_jax.service.trainer import LocalTrainer, Trainer
from catversion_jax.service.webhooks import Webhooks
from catversion_jax.service.worker import Worker
from catversion_jax.training.concept_data import Room
from catversion_jax.training.run import load_model
from catversion_jax.training.step import StepConfig
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import AnyPath, expand

DRAIN = 10
"""Seconds that requests have to end in, after which the server stops without them."""
MOST_CONNECTIONS = 2000
"""Beyond them a request is answered by 503."""


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Work:
    """Who does the work."""

    drawing_share: float  # of this process's device, while concepts train on it too
    ray: RayOptions | None = None  # whose workers train; None: this process


class Server(uvicorn.Server):
    """uvicorn, with what is to be told once it listens."""

    def __init__(self, config: uvicorn.Config, service: ConceptService, on_start: Callable[[int], object]):
        super().__init__(config)
        self._service, self._on_start = service, on_start

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_start(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame) -> None:
        # Before uvicorn waits for the requests to end: those that wait for something end by this.
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.worker.failure is not None


def serve(
    config: Config,
    folder: AnyPath,
    rules: Rules,
    address: Address,
    on_start: Callable[[int], object],
    work: Work,
) -> None:
    """Serves until SIGTERM or Ctrl-C, after which the states are saved. `on_start` is given the port it listens on.

    Raises UserError if the store, the model, the cluster or the address cannot be used, and whatever ended the worker.
    """
    with ExitStack() as stack:
        store = stack.enter_context(closing(Store(expand(folder))))
        thread = stack.enter_context(fleet_thread(work.ray)) if work.ray else None
        store.recover()
        pipe = Pipeline(config.model, load_model(config, config.batch.slots))
        drawings = Drawings(store, config, pipe)

        states = States(store.checkpoints, config.checkpoint.keep)

        def make_trainer(step: StepConfig, room: Room) -> Trainer:
            saved = states.read(step, {entry.id for entry in store.with_status("concepts", [QUEUED])})
            if thread is None:
                return LocalTrainer(config, pipe.base, room, states, saved)
            check_state_size(config, step)
            return FleetTrainer(thread, config, room, states, saved)

        set_up = partial(Learning, store, config, pipe.base, rules.limits, rules.url_hosts, make_trainer)
        worker = Worker(store, drawings, set_up, work.drawing_share)
        if thread is not None:
            thread.on_news = worker.wake
        service = ConceptService(config, pipe, store, worker, rules)
        run_server(service, address, on_start)
        if worker.failure is not None:
            raise worker.failure


@contextmanager
def fleet_thread(options: RayOptions) -> Iterator[FleetThread]:
    """Gives the thread that will drive a cluster's workers; it has ended before the cluster is left."""
    with connected(options.address) as ray:
        thread = FleetThread(ray, options)
        try:
            yield thread
        finally:
            thread.stop()


def raise_file_limit() -> None:
    """Allows as many open files as the system lets: each connection is one, and the usual 1024 are few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where the hard limit is said to be infinite, and is not
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_server(service: ConceptService, address: Address, on_start: Callable[[int], object]) -> None:
    """Runs uvicorn and the threads of a service, until a signal."""
    raise_file_limit()
    webhooks = Webhooks(service.store, service.rules.url_hosts)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        webhooks.start()
        yield
        service.draining = True
        service.worker.stop()
        webhooks.stop()
        await run_in_threadpool(service.worker.join)

    config = uvicorn.Config(
        make_app(service, lifespan),
        host=address.host,
        port=address.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN,
        limit_concurrency=MOST_CONNECTIONS,
        server_header=False,
    )
    # uvicorn raises the signal again when it has stopped: by then everything is saved, and the exit status is 0.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        Server(config, service, on_start).run()
    except SystemExit as error:
        raise UserError(f"{address}: cannot listen there; choose another --port or --host") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
