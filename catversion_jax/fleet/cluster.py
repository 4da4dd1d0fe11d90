"""A Ray cluster: its nodes, and where on them workers have a place."""

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from catversion_jax.utils.errors import UserError, one_line, short

NAMESPACE = "catversion"
LOCAL, AUTO = "local", "auto"
ACCELERATORS = ("TPU", "GPU")
OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus"}
"""How Ray calls what a worker needs of these; anything else is a resource of its own name."""


class Seat(NamedTuple):
    """A place for a worker."""

    node_id: str
    node: str  # its host's name, or its address
    number: int  # of those on this node


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    name: str
    resources: Mapping[str, float] = field(default_factory=dict)


def import_ray() -> Any:
    """Returns Ray. Raises UserError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray: Ray is not installed; pip install 'catversion-jax[ray]'") from error
    return ray


def connect(address: str) -> Any:
    """Connects to a cluster, or starts one on this machine, and returns Ray."""
    # Ray would send what it calls usage statistics to its makers, from everybody's machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_ray()
    # Ray prints the log of a node that dies, of which the driver tells in a line; it has no setting for that.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        found = address
        if address == AUTO:
            # What a cluster wrote down that has ended, perhaps.
            found = ray._private.services.canonicalize_bootstrap_address(address) or LOCAL
        if found != LOCAL:
            knock(found)
        ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--ray={address}: no Ray cluster answers ({short(error)}); start one with ray start --head, or give "
            f"--ray={LOCAL} for one on this machine; if it asks for a token, set RAY_AUTH_MODE=token"
        ) from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Gives Ray, connected to a cluster for as long as the context lasts."""
    ray = connect(address)
    try:
        yield ray
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """Raises OSError or ValueError if nobody listens at an address, for which Ray itself would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def alive_nodes(ray: Any) -> list[Node]:
    """Returns the nodes that are alive, and are not about to be taken away."""
    leaving = draining(ray)
    return [
        Node(node["NodeID"], node_name(node), node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def node_name(node: Mapping[str, Any]) -> str:
    """Returns a node's own name, which people give with ray start --node-name, or its host's."""
    own, address = node["NodeName"], node["NodeManagerAddress"]
    return own if own != address else node["NodeManagerHostname"] or address


def draining(ray: Any) -> set[str]:
    """Returns the ids of the nodes that are about to be taken away, as Ray was told (ray drain-node)."""
    return set(ray._private.state.state.get_draining_nodes())


def needs_of(text: str | None) -> dict[str, float] | None:
    """Parses what a worker needs, such as {"TPU": 4}. Raises UserError for anything else."""
    if text is None:
        return None
    expected = 'expected what one worker takes, such as {"TPU": 4} or {"GPU": 1}'
    try:
        needs = json.loads(text)
    except ValueError as error:
        raise UserError(f"--ray_resources={text}: not JSON ({short(error)}); {expected}") from None
    if not isinstance(needs, dict) or not needs or not all(is_amount(amount) for amount in needs.values()):
        raise UserError(f"--ray_resources={text}: {expected}")
    return needs


def is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6


def needs_on(node: Node, nodes: list[Node]) -> dict[str, float]:
    """Returns what a worker takes where nobody says it: a host's TPU chips, one GPU, or a node's cores."""
    if amount := node.resources.get("TPU"):
        return {"TPU": amount}
    if node.resources.get("GPU"):
        return {"GPU": 1}
    has_accelerators = any(other.resources.get(kind) for other in nodes for kind in ACCELERATORS)
    cores = node.resources.get("CPU", 0)
    # A head without accelerators keeps its cores to itself.
    return {} if has_accelerators or not cores else {"CPU": cores}


def seats(nodes: list[Node], given: Mapping[str, float] | None) -> dict[Seat, dict[str, float]]:
    """Returns the places for workers, with what each takes of its node."""
    found: dict[Seat, dict[str, float]] = {}
    for node in nodes:
        needs = dict(given) if given else needs_on(node, nodes)
        count = min((int(node.resources.get(kind, 0) // amount) for kind, amount in needs.items()), default=0)
        found |= {Seat(node.id, node.name, number): needs for number in range(count)}
    return found


def options(seat: Seat, needs: Mapping[str, float], name: str) -> dict[str, Any]:
    """Returns Ray's options of a worker."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = {OPTIONS[kind]: amount for kind, amount in needs.items() if kind in OPTIONS}
    others = {kind: amount for kind, amount in needs.items() if kind not in OPTIONS}
    return {"num_cpus": 0, **own, "resources": others} | {
        "name": f"catversion {name}",
        "max_restarts": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(seat.node_id, soft=False),
    }


def environment(needs: Mapping[str, float]) -> dict[str, str]:
    """Returns the variables of a worker's process: one without accelerators computes with its own cores alone."""
    if any(kind in needs for kind in ACCELERATORS) or "CPU" not in needs:
        return {}
    return {"NPROC": str(max(1, int(needs["CPU"]))), "JAX_PLATFORMS": "cpu"}


def last_line(error: BaseException) -> str:
    """Returns what an error says that Ray shows with the traceback of another process."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[-1], 200)
