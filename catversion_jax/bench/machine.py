"""The machine that is measured: its name, cores, memory and peak rate of matrix products."""

import os
import platform
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from catversion_jax.bench.timing import take_turns

PEAKS = {
    r"NVIDIA H100 .*HBM3": 989e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA L4": 121e12,
    r"TPU v4": 275e12,
    r"TPU v5 ?(lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6 ?(lite|e)": 918e12,
}
"""Device kind -> FLOP/s of dense bfloat16 matrix products. Sources: NVIDIA's data sheets of the H100 and H200 (SXM),
A100 and L4, without sparsity; cloud.google.com/tpu/docs/system-architecture-tpu-vm, per chip."""

PRODUCT = 2048  # side of the float32 matrices whose product measures a CPU's peak
PRODUCTS = 10  # that are timed


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def cores() -> int:
    """Returns the number of cores that this process may use, as XLA's and PyTorch's thread pools do."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name() -> str:
    """Returns the device's name; a processor's from /proc/cpuinfo, since JAX calls each of them `cpu`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if on_cpu() and platform.system() == "Linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else jax.local_devices()[0].device_kind


def matrix_peak(dtype: str) -> tuple[float | None, str]:
    """Returns the FLOP/s of large matrix products on one device, or on all cores of a CPU, and the number's source.

    The FLOP/s are None if they are not known.
    """
    if on_cpu():
        return measured_peak(), f"measured: the best of a few {PRODUCT} x {PRODUCT} float32 matrix products"
    kind = jax.local_devices()[0].device_kind
    rate = peak_of(kind)
    if dtype != "bfloat16" or rate is None:
        return None, f"not known for {dtype} on {kind}"
    return rate, f"data sheet: {rate / 1e12:.0f} TFLOP/s {dtype} per device"


def peak_of(kind: str) -> float | None:
    """Returns the FLOP/s of a device kind by PEAKS; None if it has none."""
    return next((rate for pattern, rate in PEAKS.items() if re.fullmatch(pattern, kind)), None)


def measured_peak() -> float:
    matrix = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = take_turns({"": lambda: product(matrix, matrix).block_until_ready()}, 1 + PRODUCTS)[""]
    return 2 * PRODUCT**3 / min(seconds[1:])  # the first one compiles


def check_free(more: int) -> None:
    """Raises MemoryError if fewer than `more` bytes are free, in which case the system would kill the process."""
    free = psutil.virtual_memory().available
    if more > free:
        raise MemoryError(f"{more / 2**30:.1f} GiB more are needed, {free / 2**30:.1f} GiB are free")
