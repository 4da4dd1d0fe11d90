"""Measures one size of the training step, ours and PyTorch's.

Each size has a process of its own, so that its memory peak is its own, its first compilation is cold, and running out
of memory does not end the other sizes.
"""

import math
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax

from catversion_jax.base.pipeline import MINI, Networks, model_source
from catversion_jax.bench import torch_step
from catversion_jax.bench.machine import cores, device_name, matrix_peak, on_cpu
from catversion_jax.bench.random_model import RANDOM, RANDOM_FOR, SD15, random_model, random_networks
from catversion_jax.bench.row import OURS, Row, with_flops, with_ratios, with_times
from catversion_jax.bench.step import count_flops, ours
from catversion_jax.bench.timing import take_turns
from catversion_jax.config import OF_A_RUN, Config, default, from_config_dict, stable_diffusion
from catversion_jax.training.run import load_model
from catversion_jax.training.step import steps_per_dispatch
from catversion_jax.utils import cache
from catversion_jax.utils.errors import UserError, short
from catversion_jax.weights.source import Source

REPETITIONS = 10  # timed dispatches for each size, unless `steps` says how many

MEMORY_RAN_OUT = re.compile(r"RESOURCE_EXHAUSTED|out of memory|can't allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Size:
    """A size to measure, and how."""

    config: Config | None  # None: chosen for the machine's devices
    concepts: int
    batch: int
    steps: int | None  # None: REPETITIONS dispatches
    vs_torch: bool
    trace: str | None = None  # folder for a profile of a dispatch

    def measured_config(self) -> Config:
        """Returns the config of this size."""
        return measured_config(self.config).replaced({"train.batch_size": self.batch})


def measured_config(config: Config | None) -> Config:
    """Returns a config that is complete: by default the machine's, with placeholders for what does not matter here."""
    if config is None:
        config = from_config_dict(default() if on_cpu() else stable_diffusion(SD15), OF_A_RUN)
    # No photo is read, and the prompts are random numbers.
    given = {
        "run_dir": config.run_dir,
        "data.dir": config.data.dir,
        "concept.class_word": config.concept.class_word,
    }
    return config.replaced({key: value or "none" for key, value in given.items()})


Builder = Callable[[Row], tuple[Row, Callable[[], object]]]
"""Returns the row, without its times, and the dispatch that is timed."""


class Measured(NamedTuple):
    """The results of a size's process."""

    facts: dict[str, Any]  # of the machine and the model
    rows: list[Row]
    networks: Networks
    config: Config


def measure_size(size: Size) -> tuple[dict[str, Any], list[Row]]:
    """Measures a size in fresh processes; uses no device itself, since only one process can hold a TPU."""
    try:
        measured = fresh(measure, size)
    except (RuntimeError, MemoryError) as error:
        return {}, [Row(OURS, size.concepts, size.batch, of_memory(error))]
    facts, rows = measured.facts, measured.rows
    # On an accelerator, XLA counts library calls and fused attention as nothing (see Row), so the step is counted as
    # lowered for a CPU; in another process, since the first one has already chosen its platform.
    if facts["platform"] != "cpu":
        flops = fresh(count_flops, measured.config, measured.networks, size.concepts)
        rows = [with_flops(row, flops) if row.what == OURS else row for row in rows]
    return facts, rows


def fresh(function: Callable, *arguments):
    """Calls `function` in a process that is started for it."""
    # Spawned, not forked: JAX is multithreaded, and a forked process would inherit its locks and could deadlock.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def of_memory(error: RuntimeError | MemoryError) -> str:
    """Returns what a row says if memory ran out; raises any other error again."""
    if isinstance(error, BrokenProcessPool):
        return "its process died, as it does where memory runs out"
    if isinstance(error, MemoryError) or MEMORY_RAN_OUT.search(str(error)):
        return f"does not fit in memory: {short(error)}"
    raise error


def measure(size: Size) -> Measured:
    """Measures one size: our row and, if asked for, PyTorch's rows."""
    cache.enable()
    config = size.measured_config()
    source = find_source(config)
    pipeline = random_model(config.model.dtype) if source is None else load_model(config, size.concepts)
    length = steps_per_dispatch(config.train)
    repetitions = REPETITIONS if size.steps is None else math.ceil(size.steps / length)
    peak, peak_from = matrix_peak(config.model.dtype)
    facts = facts_of(config) | {
        "peak": peak_from,
        "config": config.identity(),
    }
    builders: dict[str, Builder] = {OURS: partial(ours, config, pipeline, length, peak)}
    if size.vs_torch:
        configs = RANDOM if source is None else {name: source.config(name) for name in source.components}
        folder = config.model.folder if config.model.folder.is_dir() else None
        facts["torch"], theirs = torch_step.builders(config, configs, folder, jax.default_backend(), cores())
        builders |= theirs
    # All are built before the first one is timed, so that they can take turns.
    rows, dispatches = {}, {}
    for what, build in builders.items():
        row = Row(what, size.concepts, size.batch, steps_per_dispatch=length, repetitions=repetitions)
        try:
            rows[what], dispatches[what] = build(row)
        except (RuntimeError, MemoryError) as error:
            rows[what] = replace(row, error=of_memory(error))
    for what, seconds in take_turns(dispatches, repetitions).items():
        rows[what] = with_times(rows[what], seconds, config.train.steps)
    if size.trace and OURS in dispatches:
        with jax.profiler.trace(size.trace):
            dispatches[OURS]()
    return Measured(facts, with_ratios(list(rows.values())), pipeline.networks, config)


def facts_of(config: Config) -> dict[str, Any]:
    """Returns the machine and the model that are measured."""
    return {
        "platform": jax.default_backend(),
        "device": device_name(),
        "devices": jax.local_device_count(),
        "cores": cores(),
        "model": config.model.path or MINI.name,
        "weights": "random" if find_source(config) is None else "its own",
        "dtype": config.model.dtype,
    }


def config_networks(config: Config) -> Networks:
    """Returns the networks of a config's model, or random ones' if these stand in for it."""
    return random_networks(config.model.dtype) if find_source(config) is None else load_model(config).networks


def find_source(config: Config) -> Source | None:
    """Returns the config's model, or None if it is not on the disk and random weights stand in for it."""
    try:
        return model_source(config.model)
    except UserError:
        if config.model.path in RANDOM_FOR:
            return None
        raise
