"""Several processes, on one machine or many, that share the work: which of them this one is.

Concepts share nothing, so neither do processes: each is a JAX of its own on its own devices, and one that is lost takes
no other one with it. `jax.distributed` serves for one thing, that all of them have started, and in a process of its
own: where the others do not come, its client ends the process that it runs in.
"""

import os
import subprocess
import sys
from typing import NamedTuple

from absl import flags

from catversion_jax.errors import UserError

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


def define_flags() -> None:
    flags.DEFINE_integer("num_processes", None, "How many processes share the work. Default: this one alone.", 1)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", 0)
    flags.DEFINE_bool("distributed", False, "Take both from the cluster's environment: SLURM, MPI, SkyPilot or GKE.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0: begin when all processes have started.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for that.", lower_bound=1)


def start(arguments: flags.FlagValues) -> Process:
    """Find out which process this is and, where there is a coordinator and more than one process, wait for all."""
    count, index, address = arguments.num_processes, arguments.process_id, arguments.coordinator_address
    if (count is None) != (index is None):
        raise UserError("--num_processes and --process_id: expected both or none")
    if arguments.distributed and count is None:
        index, count = from_environment()
    if count is None and address is not None:
        raise UserError("--coordinator_address: needs --num_processes and --process_id, or --distributed")
    process = Process(index or 0, count or 1)
    if process.index >= process.count:
        raise UserError(f"--process_id={index}: expected 0 to {count - 1}, since --num_processes={count}")
    if address is not None and process.count > 1:
        meet(address, process, arguments.start_timeout)
    return process


def from_environment() -> tuple[int, int]:
    for index, count in CLUSTERS:
        if index in os.environ and count in os.environ:
            value = os.environ[count]
            try:
                return int(os.environ[index]), len(value.split(",")) if count.endswith("HOSTNAMES") else int(value)
            except ValueError:
                raise UserError(
                    f"--distributed: {index}={os.environ[index]!r}, {count}={value!r}; not numbers"
                ) from None
    known = ", ".join(count for _, count in CLUSTERS)
    raise UserError(f"--distributed: none of {known} is set here; give --num_processes and --process_id")


def meet(address: str, process: Process, timeout: int) -> None:
    """Wait until all processes are there. Raises UserError where they are not in time."""
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
            "another port or a longer --start_timeout"
        )
