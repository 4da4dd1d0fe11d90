"""What Prometheus is told at /metrics."""

import time
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from catversion_jax.service.requests import DONE, FAILED, PREPARING, QUEUED, TRAINING
from catversion_jax.service.store import Store
from catversion_jax.service.worker import Worker

HOUR = 3600.0
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """The numbers of one server; those of the store and the worker are read when they are asked for."""

    def __init__(self, store: Store, worker: Worker):
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "catversion_request_seconds",
            "Time to answer a request.",
            ("method", "route", "status"),
            registry=self.registry,
            buckets=SECONDS,
        )
        names = {"concepts": "learn a concept", "pictures": "draw a picture"}
        self.latencies = {
            table: Histogram(
                f"catversion_{table}_seconds",
                f"Time to {what}, from when it was asked for.",
                registry=self.registry,
                buckets=SECONDS,
            )
            for table, what in names.items()
        }
        self.ended = Counter(
            "catversion_ended", "Concepts and pictures that ended.", ("what", "status"), registry=self.registry
        )
        store.on_end = self.count_end
        depths = {
            ("concepts", "waiting"): lambda: store.count("concepts", (QUEUED, PREPARING)),
            ("concepts", "training"): lambda: store.count("concepts", (TRAINING,)),
            ("pictures", "waiting"): lambda: store.count("pictures", (QUEUED,)),
        }
        depth = Gauge(
            "catversion_queue", "Concepts and pictures by where they are.", ("what", "where"), registry=self.registry
        )
        for labels, count in depths.items():
            depth.labels(*labels).set_function(count)
        spent = Gauge(
            "catversion_worker_seconds", "What the worker spent its time on.", ("doing",), registry=self.registry
        )
        for doing in worker.spent:
            spent.labels(doing).set_function(partial(worker.spent.__getitem__, doing))
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "slots": ("Slots of the training step.", lambda: slots(worker)),
            "slots_busy": ("Slots with a concept in them.", lambda: busy(worker)),
            "images": ("Photos that training has taken.", lambda: worker.learning.images if worker.learning else 0),
            "images_per_second": ("Photos that training takes a second, at its present step.", lambda: rate(worker)),
            "concepts_per_hour": (
                "Concepts done in the last hour.",
                lambda: store.ended_since("concepts", DONE, time.time() - HOUR),
            ),
            "storage_problem": ("1 while the disk refuses what is to be written.", lambda: float(bool(worker.problem))),
        }
        for name, (meaning, read) in gauges.items():
            Gauge(f"catversion_{name}", meaning, registry=self.registry).set_function(read)

    def count_end(self, table: str, status: str, seconds: float) -> None:
        """Counts a concept or a picture that ended, after so many seconds."""
        self.ended.labels(table, status).inc()
        if status != FAILED:
            self.latencies[table].observe(seconds)


def slots(worker: Worker) -> float:
    return worker.learning.trainer.slots if worker.learning else 0


def busy(worker: Worker) -> float:
    return worker.learning.trainer.entered if worker.learning else 0


def rate(worker: Worker) -> float:
    learning = worker.learning
    if learning is None or not learning.seconds_per_step:
        return 0.0
    return busy(worker) * learning.config.train.batch_size / learning.seconds_per_step
