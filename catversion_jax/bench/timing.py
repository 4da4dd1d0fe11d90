"""Timing of dispatches and compilations."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from catversion_jax.training.step import StepConfig, compile_chunk
from catversion_jax.utils import cache


def take_turns(dispatches: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Returns the seconds of each repetition. The contenders take turns, so that other load affects all alike."""
    seconds: dict[str, list[float]] = {what: [] for what in dispatches}
    for _ in range(repetitions):
        for what, dispatch in dispatches.items():
            start = time.perf_counter()
            dispatch()
            seconds[what].append(time.perf_counter() - start)
    return seconds


def timed(function: Callable, *arguments: Any) -> tuple[float, Any]:
    """Calls a function; returns the seconds until its result is there, and the result."""
    begun = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun, result


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Uses a new, empty persistent compilation cache within the context."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds its flags at run time
    with tempfile.TemporaryDirectory() as folder:
        use_cache(folder)
        try:
            yield
        finally:
            use_cache(before)


def use_cache(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # otherwise it keeps the folder that it first saw


def timed_compile(step_config: StepConfig, length: int, *inputs) -> tuple[float, float, int, Any]:
    """Returns the seconds of tracing and of compiling, the hits in the persistent cache, and the compiled program."""
    hits = []

    def listen(event: str, **_) -> None:
        if cache.EVENTS.get(event) == "hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    begin = time.perf_counter()
    lowered = compile_chunk(step_config, length).lower(*inputs)
    traced = time.perf_counter()
    step = lowered.compile()
    return traced - begin, time.perf_counter() - traced, len(hits), step
