"""What programs should cost on a chip that is not there: their kernels, bytes, FLOPs and memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.bench.absent import CHIPS, as_if_there, lower_step, set_environment
from catversion_jax.bench.measure import Size, config_networks, fresh, measured_config
from catversion_jax.bench.pictures import PictureBatch, count_pictures, picture_shapes
from catversion_jax.bench.program import Program, read_program
from catversion_jax.bench.step import count_flops
from catversion_jax.bench.timing import timed
from catversion_jax.config import Config
from catversion_jax.training.step import ACCELERATOR_STEPS_PER_DISPATCH
from catversion_jax.utils import markdown


@dataclass(frozen=True)
class Cost:
    """A program on one chip. The times are what its bytes and its FLOPs alone take at the chip's full rates."""

    kernels: int
    bytes: float  # that the kernels read and write
    flops: float
    memory_bytes: float  # arguments, results and temporary memory
    ms_of_bytes: float
    ms_of_flops: float
    fits: bool  # the memory into the chip's
    compile_s: float  # on this machine
    kinds: dict[str, tuple[int, int]]  # kernels and bytes of each kind

    @property
    def ms(self) -> float:
        """The milliseconds that it takes at least."""
        return max(self.ms_of_bytes, self.ms_of_flops)


@dataclass(frozen=True)
class StepForecast:
    """A step of the training of some concepts, each with a batch of photos, on one chip."""

    chip: str  # a key of CHIPS
    concepts: int
    batch: int
    step: Cost

    @property
    def images_per_s(self) -> float:
        """At most."""
        return 1e3 * self.concepts * self.batch / self.step.ms


@dataclass(frozen=True)
class PictureForecast:
    """A batch of pictures, drawn on one chip."""

    chip: str  # a key of CHIPS
    pictures: int
    calls: int  # of the UNet
    call: Cost
    decoder: Cost

    @property
    def pictures_per_s(self) -> float:
        """At most."""
        return 1e3 * self.pictures / (self.calls * self.call.ms + self.decoder.ms)


class Compiled(NamedTuple):
    """A program that was compiled for a chip."""

    program: Program
    memory: float
    seconds: float


def forecast_step(size: Size, chip: str) -> StepForecast:
    """Compiles a size for one chip, in fresh processes. Raises UserError if its compiler is not installed."""
    set_environment()  # of this process, which the fresh ones inherit
    step, networks, config = fresh(compile_size, size, chip)
    flops = fresh(count_flops, config, networks, size.concepts)
    return StepForecast(chip, size.concepts, size.batch, cost(step, flops, chip))


def compile_size(size: Size, chip: str) -> tuple[Compiled, Networks, Config]:
    """Compiles a size for one chip, in a process that has used no device."""
    config, of = size.measured_config(), CHIPS[chip]
    length = config.train.steps_per_dispatch or ACCELERATOR_STEPS_PER_DISPATCH
    networks = config_networks(config)
    mesh = config.make_mesh(size.concepts, of.devices()[:1])
    with as_if_there(of.backend, of.devices()[:1]):
        return compiled(lower_step(config, networks, mesh, size.concepts, length)), networks, config


def forecast_pictures(config: Config | None, pictures: int, chip: str) -> PictureForecast:
    """Compiles the drawing of that many pictures at once for one chip, as `forecast_step` does."""
    set_environment()
    programs, networks, sampler = fresh(compile_pictures, config, pictures, chip)
    calls, *flops = fresh(count_pictures, networks, sampler, pictures)
    call, decoder = (cost(*of_each, chip) for of_each in zip(programs, flops, strict=True))
    return PictureForecast(chip, pictures, calls, call, decoder)


def compile_pictures(config: Config | None, pictures: int, chip: str) -> tuple[list[Compiled], Networks, SamplerConfig]:
    """Compiles the UNet's calls and the decoder for one chip, in a process that has used no device."""
    config, of = measured_config(config), CHIPS[chip]
    networks, sampler, device = config_networks(config), config.sample.sampler, of.devices()[0]
    batch = PictureBatch.random(networks, sampler, pictures, picture_shapes(networks))
    with as_if_there(of.backend, [device]):
        return [compiled(lowered) for lowered in batch.lower(device)], networks, sampler


def compiled(lowered: jax.stages.Lowered) -> Compiled:
    took, program = timed(lowered.compile)
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(read_program(program.as_text() or ""), held + memory.temp_size_in_bytes, took)


def cost(compiled: Compiled, flops: float, chip: str) -> Cost:
    program, of = compiled.program, CHIPS[chip]
    return Cost(
        len(program.kernels),
        program.bytes,
        flops,
        compiled.memory,
        1e3 * program.bytes / of.bandwidth,
        1e3 * flops / of.flops,
        compiled.memory < of.memory,
        compiled.seconds,
        program.by_kind(),
    )


COLUMNS = {
    "kernels": lambda cost: str(cost.kernels),
    "GB": lambda cost: f"{cost.bytes / 1e9:.2f}",
    "TFLOP": lambda cost: f"{cost.flops / 1e12:.2f}",
    "ms of bytes": lambda cost: f"{cost.ms_of_bytes:.1f}",
    "ms of FLOPs": lambda cost: f"{cost.ms_of_flops:.1f}",
    "memory GiB": lambda cost: f"{cost.memory_bytes / 2**30:.2f}" + ("" if cost.fits else ", does not fit"),
    "compile s": lambda cost: f"{cost.compile_s:.0f}",
}


def step_table(rows: list[StepForecast]) -> str:
    """Returns the steps as a Markdown table, and the kernels of each by their kind."""
    return cost_tables(
        ["concepts x batch", "at most images/s"],
        [([f"{row.concepts}x{row.batch}", f"{row.images_per_s:.0f}"], row.step) for row in rows],
    )


def picture_table(rows: list[PictureForecast]) -> str:
    """Returns the programs of each batch of pictures as a Markdown table, and their kernels by their kind."""
    costs = []
    for row in rows:
        rate = f"{row.pictures_per_s:.2f} by {row.calls} calls"
        costs.append(([f"{row.pictures}, a call of the UNet", rate], row.call))
        costs.append(([f"{row.pictures}, the decoder", ""], row.decoder))
    return cost_tables(["pictures at once", "at most pictures/s"], costs)


def cost_tables(titles: list[str], costs: list[tuple[list[str], Cost]]) -> str:
    """Returns a table of programs, each with its name and its rate, and one of each program's kernels."""
    rows = ([*cells, *(column(cost) for column in COLUMNS.values())] for cells, cost in costs)
    tables = [markdown.table([*titles, *COLUMNS], rows)]
    for (name, _), cost in costs:
        kinds = ([kind, str(count), f"{size / 1e9:.3f}"] for kind, (count, size) in cost.kinds.items())
        tables.append(f"{name}:\n" + markdown.table(["kernels", "count", "GB"], kinds))
    return "\n\n".join(tables)
