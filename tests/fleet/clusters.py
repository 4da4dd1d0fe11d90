"""Real Ray clusters of several nodes on this machine, and the command that trains on them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.commands import ENVIRONMENT, ROOT, command

PATIENCE = 300.0


@contextmanager
def cluster_of(names: str, environment: Mapping[str, str] | None = None) -> Iterator["Nodes"]:
    """Gives a cluster whose head has no place for a worker, with a node of one core for each name."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0"} | dict(environment or {}))
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = Nodes(cluster)
        for name in names:
            nodes.add(name)
        yield nodes
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


class Nodes:
    """The nodes of a cluster, by name."""

    def __init__(self, cluster) -> None:
        self.cluster, self.address = cluster, cluster.address
        self.by_name: dict = {}

    def add(self, name: str) -> None:
        self.by_name[name] = self.cluster.add_node(num_cpus=1, node_name=name)

    def kill(self, name: str) -> None:
        """Kills all processes of a node at once, as a machine that is switched off."""
        self.cluster.remove_node(self.by_name.pop(name), allow_graceful=False)

    def drain(self, name: str) -> None:
        """Tells Ray that a node will be taken away soon."""
        node = self.by_name[name]
        subprocess.run(
            [*RAY, "drain-node", f"--address={self.address}", f"--node-id={node.node_id}", "--reason-message=preempted",
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=60"],
            check=True, capture_output=True,
        )  # fmt: skip


RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def workers_of(node) -> list[psutil.Process]:
    """The processes of a node that learn."""
    raylet = next(info.process.pid for info in node.all_processes["raylet"])
    return [process for process in psutil.Process(raylet).children() if is_worker(process)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "ConceptWorker" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def start(run: list[object], address: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*run, f"--ray={address}", *flags),
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


def ended(out: Path) -> int:
    return len(list(out.glob("*/status.json")))
