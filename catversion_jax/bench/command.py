"""`catversion bench`: how fast the training step is, for C concepts with batches of B; one table, also as JSON.

Each size has a process of its own: its memory peak is its own, its first compilation is a cold one, and one that runs
out of memory does not end the others.
"""

import datetime
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from catversion_jax import cache, train
from catversion_jax import config as config_lib
from catversion_jax.bench import torch_step
from catversion_jax.bench.machine import cores, device_name, matrix_peak, on_cpu
from catversion_jax.bench.random_model import RANDOM, RANDOM_FOR, SD15, random_model
from catversion_jax.bench.row import OURS, Row, to_table, with_flops, with_ratios, with_times
from catversion_jax.bench.step import count_flops, ours
from catversion_jax.bench.timing import take_turns
from catversion_jax.errors import UserError, short
from catversion_jax.files import write_atomically
from catversion_jax.pipeline import MINI, Networks
from catversion_jax.run_dir import plain
from catversion_jax.source import Source, open_source

SIZES = "1x2,4x2,16x2,32x2"

REPETITIONS = 10  # timed dispatches for each size, unless --steps says how many

MEMORY_RAN_OUT = re.compile(r"RESOURCE_EXHAUSTED|out of memory|can't allocate memory", re.IGNORECASE)


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/; without it, the mini model on a CPU and Stable Diffusion 1.5 elsewhere."
    )
    flags.DEFINE_string("sizes", SIZES, "CONCEPTSxBATCH, several separated by commas.")
    flags.DEFINE_integer(
        "steps", None, f"Timed steps for each size, in whole dispatches; {REPETITIONS} dispatches.", lower_bound=1
    )
    flags.DEFINE_enum("vs", None, ["torch"], "Also time PyTorch and diffusers, taking turns.")
    flags.DEFINE_string("out", None, "A JSON file for the table and what it was measured on.")


@dataclass(frozen=True)
class Job:
    """One size."""

    config: ConfigDict | None  # None: `prepared` takes one for the machine's devices
    concepts: int
    batch: int
    steps: int | None  # None: REPETITIONS dispatches
    vs_torch: bool


class Measured(NamedTuple):
    """What a size's process hands back."""

    facts: dict[str, Any]  # of the machine and the model
    rows: list[Row]
    networks: Networks
    config: ConfigDict


def main(arguments: flags.FlagValues) -> int:
    """Print the table; the row of a size that does not fit says so."""
    sizes = parse_sizes(arguments.sizes)
    if arguments.vs:
        torch_step.check_installed()
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch shall find memory too
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    rows: list[Row] = []
    for concepts, batch in (bar := tqdm(sizes, unit=" sizes")):
        bar.set_description(f"{concepts}x{batch}")
        of_machine, of_size = run(Job(arguments.config, concepts, batch, arguments.steps, arguments.vs is not None))
        facts |= of_machine
        rows += of_size
        if arguments.out:
            report = json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1)
            write_atomically(config_lib.expand(arguments.out), lambda path, report=report: path.write_text(report))
    print(*(f"{name}: {value}" for name, value in facts.items() if name != "config"), sep="\n")
    print("", to_table(rows), sep="\n")
    return 0


def parse_sizes(value: str) -> list[tuple[int, int]]:
    """Concepts and batch of each size."""
    sizes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size.strip()) for size in value.split(",")]
    if not all(sizes):
        raise UserError(f"--sizes={value}: expected CONCEPTSxBATCH, several separated by commas, such as {SIZES}")
    return [(int(size[1]), int(size[2])) for size in sizes]


def run(job: Job) -> tuple[dict[str, Any], list[Row]]:
    """Measure a size in fresh processes; touches no device itself, since a TPU can be held by one process only."""
    try:
        measured = fresh(measure, job)
    except (RuntimeError, MemoryError) as error:
        return {}, [Row(OURS, job.concepts, job.batch, of_memory(error))]
    facts, rows = measured.facts, measured.rows
    if facts["platform"] != "cpu":
        flops = fresh(count_flops, measured.config, measured.networks, job.concepts)
        rows = [with_flops(row, flops) if row.what == OURS else row for row in rows]
    return facts, rows


def fresh(function: Callable, *arguments):
    """Call `function` in a process that is started for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def of_memory(error: RuntimeError | MemoryError) -> str:
    """What a row says where memory ran out; any other error is raised again."""
    if isinstance(error, BrokenProcessPool):
        return "its process died, as it does where memory runs out"
    if isinstance(error, MemoryError) or MEMORY_RAN_OUT.search(str(error)):
        return f"does not fit in memory: {short(error)}"
    raise error


def measure(job: Job) -> Measured:
    """The rows of one size: ours and, where asked for, PyTorch's."""
    cache.enable()
    config = prepared(job)
    source = find_source(config)
    pipeline = random_model(config.model.dtype) if source is None else train.load_model(config, job.concepts)
    length = train.steps_per_dispatch(config)
    repetitions = REPETITIONS if job.steps is None else math.ceil(job.steps / length)
    peak, peak_from = matrix_peak(config.model.dtype)
    facts = {
        "platform": jax.default_backend(),
        "device": device_name(),
        "devices": jax.local_device_count(),
        "cores": cores(),
        "model": config.model.path or MINI.name,
        "weights": "random" if source is None else "its own",
        "dtype": config.model.dtype,
        "peak": peak_from,
        "config": plain(config),
    }
    builders = {OURS: partial(ours, config, pipeline, length, peak)}
    if job.vs_torch:
        configs = RANDOM if source is None else {name: source.config(name) for name in source.components}
        path = config_lib.model_path(config)
        folder = path if path.is_dir() else None
        facts["torch"], theirs = torch_step.builders(config, configs, folder, jax.default_backend(), cores())
        builders |= theirs
    rows, dispatches = {}, {}
    for what, build in builders.items():
        row = Row(what, job.concepts, job.batch, steps_per_dispatch=length, repetitions=repetitions)
        try:
            rows[what], dispatches[what] = build(row)
        except (RuntimeError, MemoryError) as error:
            rows[what] = replace(row, error=of_memory(error))
    for what, seconds in take_turns(dispatches, repetitions).items():
        rows[what] = with_times(rows[what], seconds, config.train.steps)
    return Measured(facts, with_ratios(list(rows.values())), pipeline.networks, config)


def prepared(job: Job) -> ConfigDict:
    """The config of one size; what a run needs besides a model and its setting is of no account here."""
    if job.config is None:
        config = config_lib.default() if on_cpu() else config_lib.stable_diffusion(SD15)
    else:
        config = job.config
    config.train.batch_size = job.batch
    for section, key in ((config, "run_dir"), (config.data, "dir"), (config.concept, "class_word")):
        section[key] = section[key] or "none"
    config_lib.check(config)
    return config


def find_source(config: ConfigDict) -> Source | None:
    """The model that the config names, where it is on the disk; None where random weights stand in for it."""
    model = config.model
    try:
        return open_source(model.path or str(MINI), model.revision, model.variant, model.prediction_type)
    except UserError:
        if model.path in RANDOM_FOR:
            return None
        raise
