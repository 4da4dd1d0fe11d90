"""What a worker's process needs to know of its machine before JAX looks for devices."""

import glob
import os

BOUNDS = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}
"""How the chips of a host lie, by their number."""


def alone_on_tpu() -> dict[str, str]:
    """Returns the variables by which the TPU's library does not wait for the other hosts of a slice."""
    chips = os.environ.get("TPU_VISIBLE_CHIPS")  # which Ray sets where a worker has some of a host's
    count = len(chips.split(",")) if chips else len(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    if count not in BOUNDS:
        return {}
    return {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": BOUNDS[count],
        "TPU_WORKER_ID": "0",
        "CLOUD_TPU_TASK_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
