"""Several processes, on one machine or many, that share the work: which of them this one is.

Concepts share nothing, so neither do processes: each is a JAX of its own on its own devices, and one that is lost takes
no other one with it. `jax.distributed` serves for one thing, that all of them have started, and in a process of its
own: where the others do not come, its client ends the process that it runs in.
"""

import os
import subprocess
import sys
from typing import NamedTuple

from catversion_jax.utils.errors import UserError

MEET = """
import sys, jax
address, count, index, timeout = sys.argv[1:]
jax.distributed.initialize(
    address, int(count), int(index), initialization_timeout=int(timeout), cluster_detection_method="deactivate"
)
jax.distributed.shutdown()
"""


class Process(NamedTuple):
    """This process among those that share the work."""

    index: int = 0
    count: int = 1


CLUSTERS = (
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),  # GKE; the names of all, with commas
)
"""Environment variables in which a cluster tells the process and how many there are."""


def from_environment() -> Process:
    """The process as the cluster's environment has it. Raises UserError if no known cluster's variables are set."""
    for index, count in CLUSTERS:
        if index in os.environ and count in os.environ:
            value = os.environ[count]
            try:
                return Process(
                    int(os.environ[index]), len(value.split(",")) if count.endswith("HOSTNAMES") else int(value)
                )
            except ValueError:
                raise UserError(
                    f"{index}={os.environ[index]!r}, {count}={value!r}: expected numbers in the environment"
                ) from None
    known = ", ".join(count for _, count in CLUSTERS)
    raise UserError(f"none of {known} is set here; expected a cluster's environment; give num_processes and process_id")


def meet(address: str, process: Process, timeout: int) -> None:
    """Waits until all processes are there. Raises UserError if they are not in time."""
    values = map(str, (address, process.count, process.index, timeout))
    run = [sys.executable, "-c", MEET, *values]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # no device is needed, and none must be taken
    try:
        met = subprocess.run(run, env=environment, capture_output=True, timeout=timeout + 60).returncode == 0
    except subprocess.TimeoutExpired:
        met = False
    if not met:
        raise UserError(
            f"{address}: process {process.index} did not meet all {process.count} processes there within {timeout} s; "
            "start all of them, check that process 0 runs on that host and that the port is free and open, or choose "
            "another port or a longer start_timeout"
        )
