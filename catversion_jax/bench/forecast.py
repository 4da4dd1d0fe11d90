"""What a step should cost on a chip that is not there: the kernels, bytes, FLOPs and memory of its program."""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from catversion_jax.base.pipeline import Networks
from catversion_jax.bench.absent import CHIPS, compile_step, set_environment
from catversion_jax.bench.measure import Size, find_source, fresh
from catversion_jax.bench.program import Program, read_program
from catversion_jax.bench.random_model import random_networks
from catversion_jax.bench.step import count_flops
from catversion_jax.config import Config
from catversion_jax.training.run import load_model
from catversion_jax.training.step import ACCELERATOR_STEPS_PER_DISPATCH
from catversion_jax.utils import markdown


@dataclass(frozen=True)
class Forecast:
    """A size on one chip. The times are what its bytes and its FLOPs alone take at the chip's full rates."""

    chip: str  # a key of CHIPS
    concepts: int
    batch: int
    compile_s: float  # on this machine
    kernels: int  # of a step
    bytes_per_step: float
    flops_per_step: float
    memory_bytes: float  # arguments, results and temporary memory
    ms_of_bytes: float
    ms_of_flops: float
    fits: bool  # the memory into the chip's
    kinds: dict[str, tuple[int, int]]  # kernels and bytes of each kind


class Compiled(NamedTuple):
    """What the process that compiles returns."""

    seconds: float
    program: Program
    memory: float
    networks: Networks
    config: Config


def forecast(size: Size, chip: str) -> Forecast:
    """Compiles a size for one chip, in fresh processes. Raises UserError if its compiler is not installed."""
    set_environment()  # of this process, which the fresh ones inherit
    compiled = fresh(compile_size, size, chip)
    flops = fresh(count_flops, compiled.config, compiled.networks, size.concepts)
    of = CHIPS[chip]
    return Forecast(
        chip,
        size.concepts,
        size.batch,
        compiled.seconds,
        len(compiled.program.kernels),
        compiled.program.bytes,
        flops,
        compiled.memory,
        1e3 * compiled.program.bytes / of.bandwidth,
        1e3 * flops / of.flops,
        compiled.memory < of.memory,
        compiled.program.by_kind(),
    )


def compile_size(size: Size, chip: str) -> Compiled:
    """Compiles a size for one chip, in a process that has used no device."""
    config, of = size.measured_config(), CHIPS[chip]
    length = config.train.steps_per_dispatch or ACCELERATOR_STEPS_PER_DISPATCH
    networks = random_networks(config.model.dtype) if find_source(config) is None else load_model(config).networks
    mesh = config.make_mesh(size.concepts, of.devices()[:1])
    begun = time.monotonic()
    compiled = compile_step(config, networks, of.backend, mesh, size.concepts, length)
    took = time.monotonic() - begun
    program = read_program(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(took, program, held + memory.temp_size_in_bytes, networks, config)


COLUMNS = {
    "concepts x batch": lambda row: f"{row.concepts}x{row.batch}",
    "kernels a step": lambda row: str(row.kernels),
    "GB": lambda row: f"{row.bytes_per_step / 1e9:.2f}",
    "TFLOP": lambda row: f"{row.flops_per_step / 1e12:.2f}",
    "ms of bytes": lambda row: f"{row.ms_of_bytes:.1f}",
    "ms of FLOPs": lambda row: f"{row.ms_of_flops:.1f}",
    "at most images/s": lambda row: f"{1e3 * row.concepts * row.batch / max(row.ms_of_bytes, row.ms_of_flops):.0f}",
    "memory GiB": lambda row: f"{row.memory_bytes / 2**30:.2f}" + ("" if row.fits else ", does not fit"),
    "compile s": lambda row: f"{row.compile_s:.0f}",
}


def forecast_table(rows: list[Forecast]) -> str:
    """Returns the rows as a Markdown table, and the kernels of each by their kind."""
    tables = [markdown.table(list(COLUMNS), ([cell(row) for cell in COLUMNS.values()] for row in rows))]
    for row in rows:
        kinds = ([kind, str(count), f"{size / 1e9:.3f}"] for kind, (count, size) in row.kinds.items())
        tables.append(f"{row.concepts}x{row.batch}:\n" + markdown.table(["kernels of a step", "count", "GB"], kinds))
    return "\n\n".join(tables)
