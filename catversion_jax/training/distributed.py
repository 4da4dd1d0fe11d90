"""Identifies this process among several, on one machine or many, and waits until all of them have started.

Concepts share nothing, so neither do the processes: each runs JAX by itself on its own devices, and losing one does not
affect the others. `jax.distributed` is used only to wait for all of them, in a process of its own, because its client
terminates the process that it runs in if the others do not come.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

from catversion_jax.utils.errors import UserError

MEET = """
import sys, jax
address, count, index, timeout = sys.argv[1:]
jax.distributed.initialize(
    address, int(count), int(index), initialization_timeout=int(timeout), cluster_detection_method="deactivate"
)
jax.distributed.shutdown()
"""


@dataclass(frozen=True)
class Process:
    """The index of this process, and the number of processes that share the work."""

    index: int = 0
    count: int = 1


CLUSTERS = (
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),  # GKE; the names of all, with commas
)
"""Environment variables that hold the process's index and the number of processes, for each kind of cluster."""


def from_environment() -> Process:
    """Reads the process from the cluster's environment. Raises UserError if no known cluster's variables are set."""
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
    """Waits until all processes have started. Raises UserError if they have not within `timeout` seconds."""
    if process.count == 1:
        return
    values = map(str, (address, process.count, process.index, timeout))
    run = [sys.executable, "-c", MEET, *values]
    # On a TPU only one process can hold the devices, and that must be this one.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
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
