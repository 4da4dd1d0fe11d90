"""Chips that are not there: the step is compiled for them on this machine, by their own compilers."""

import abc
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from catversion_jax.base.pipeline import DTYPES, Networks, abstract
from catversion_jax.bench.machine import peak_of
from catversion_jax.bench.step import random_data
from catversion_jax.config import Config
from catversion_jax.models.sharding import sharding
from catversion_jax.training.state import Frozen
from catversion_jax.training.step import StepConfig, compile_chunk
from catversion_jax.utils.errors import UserError, short

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What has to be set before JAX looks for devices, so that the compilers do not look for the chips."""


@dataclass(frozen=True)
class Chip(abc.ABC):
    """A chip, with what its compiler needs to know of it."""

    backend: ClassVar[str]  # as JAX calls it
    install: ClassVar[str]  # how its compiler is

    name: str
    bandwidth: float  # of its memory, bytes a second
    memory: float  # bytes

    @property
    def flops(self) -> float:
        """FLOP/s of dense bfloat16 matrix products."""
        return peak_of(self.name) or math.nan

    def devices(self) -> list[jax.Device]:
        """Returns the chips of one host. Raises UserError if their compiler is not installed."""
        try:
            return list(self.topology().devices)
        except Exception as error:  # of whatever kind a plug-in that is missing or too old raises
            raise UserError(
                f"--for: {self.name}: its compiler cannot be used ({short(error)}); {self.install} with the newest JAX "
                "that this Python has"
            ) from error

    @abc.abstractmethod
    def topology(self) -> Any:
        """Returns JAX's description of the chips."""


@dataclass(frozen=True)
class TPU(Chip):
    """A TPU; sources: cloud.google.com/tpu/docs, per chip."""

    backend = "tpu"
    install = "pip install 'catversion-jax[tpu]'"

    slice: str

    def topology(self) -> Any:
        return topologies.get_topology_desc(platform="tpu", topology_name=self.slice)


@dataclass(frozen=True)
class GPU(Chip):
    """An NVIDIA GPU; sources: its data sheet, and the CUDA programming guide's table of compute capabilities."""

    backend = "gpu"
    install = "pip install 'catversion-jax[cuda]'"

    capability: tuple[int, int]
    multiprocessors: int
    shared: int  # bytes of the shared memory of one of them; a block may have 1024 less
    cache: int  # bytes of the L2 cache
    clock: float  # GHz
    lanes: int = 128  # of float32 in a multiprocessor
    threads: int = 2048  # that fit into one

    def topology(self) -> Any:
        return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=self.target())

    def target(self) -> str:
        """Returns the chip as XLA's GpuTargetConfigProto, in text form."""
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
            "threads_per_core_limit": self.threads,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": int(self.memory),
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        fields = " ".join(f"{name}: {value}" for name, value in info.items())
        major, minor = self.capability
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
            'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 12 minor: 8 }\n'
            f'device_description_str: "{self.name}"\n'
        )


HOPPER: dict[str, Any] = {
    "capability": (9, 0), "multiprocessors": 132, "shared": 228 << 10, "cache": 50 << 20, "clock": 1.98,
}  # fmt: skip
CHIPS: dict[str, Chip] = {
    "h100": GPU("NVIDIA H100 80GB HBM3", 3.35e12, 80e9, **HOPPER),
    "h200": GPU("NVIDIA H200", 4.8e12, 141e9, **HOPPER),
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB", 2.04e12, 80e9, capability=(8, 0), multiprocessors=108, lanes=64,
        shared=164 << 10, cache=40 << 20, clock=1.41,
    ),
    "l4": GPU(
        "NVIDIA L4", 0.3e12, 24e9, capability=(8, 9), multiprocessors=58, threads=1536,
        shared=100 << 10, cache=48 << 20, clock=2.04,
    ),
    "v5e": TPU("TPU v5e", 0.819e12, 16e9, slice="v5e:2x2"),
    "v6e": TPU("TPU v6e", 1.64e12, 32e9, slice="v6e:2x2"),
}  # fmt: skip
"""The chips that --for knows."""


@contextmanager
def as_if_there(backend: str, devices: Sequence[jax.Device]) -> Iterator[None]:
    """Has the step choose what it would choose on these devices. For a process that does nothing else."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    before = jax.default_backend, jax.devices, cudnn.check_compute_capability
    jax.default_backend = lambda: backend
    jax.devices = lambda *_: list(devices)
    # It asks the devices that are there.
    cudnn.check_compute_capability = lambda least: all(
        float(getattr(device, "compute_capability", 0)) >= float(least) for device in devices
    )
    try:
        yield
    finally:
        jax.default_backend, jax.devices, cudnn.check_compute_capability = before


def lower_step(config: Config, networks: Networks, mesh: Mesh, concepts: int, length: int) -> jax.stages.Lowered:
    """Returns the program of `length` steps of that many concepts, for the devices of a mesh, within `as_if_there`."""
    dtype = DTYPES[config.model.dtype]
    step_config = StepConfig.of(config, networks, concepts, mesh)

    def on_concepts(tree):
        place = sharding(mesh, "concept")
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def spread(name: str, module: Any):
        return abstract(name, module, dtype, mesh, config.mesh.rules)

    text = tuple(spread("text", encoder) for encoder in networks.text)
    frozen = Frozen(spread("unet", networks.unet), text, networks.schedule.alphas_cumprod)
    state = jax.eval_shape(lambda: step_config.init_state([0] * concepts))
    data = random_data(config, step_config, text, concepts)
    return compile_chunk(step_config, length).lower(on_concepts(state), frozen, on_concepts(data))


def set_environment() -> None:
    os.environ |= ENVIRONMENT
