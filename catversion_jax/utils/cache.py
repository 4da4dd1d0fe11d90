"""XLA's persistent compilation cache, enabled by default, with a count of its hits and misses."""

import atexit
import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import jax

COUNTS = "catversion_counts.json"
EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}


def home() -> Path:
    """This package's folder in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "catversion_jax"


def folder() -> Path:
    """The folder of compiled programs: $JAX_COMPILATION_CACHE_DIR or, if that is unset, our own."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home() / "xla")


def enable() -> None:
    """Keeps compiled programs between runs; at exit, records this process's hits and misses for `doctor`."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home must not stop the command
        return
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    # JAX's default keeps only programs that took at least 1 s to compile; the many small ones add up at each start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    counts: Counter[str] = Counter()

    def listen(event: str, **_) -> None:
        if event in EVENTS:
            counts[EVENTS[event]] += 1

    jax.monitoring.register_event_listener(listen)
    atexit.register(note, counts)


def read_counts() -> dict[str, dict[str, int]]:
    """Returns hits and misses of the last process that compiled anything (`last`) and of all processes (`total`)."""
    try:
        return json.loads((folder() / COUNTS).read_text())
    except (OSError, ValueError):
        return {"last": {}, "total": {}}


def note(counts: Counter) -> None:
    if not counts:
        return
    total = Counter(read_counts()["total"]) + counts
    with contextlib.suppress(OSError):  # a lost count is not worth an error
        (folder() / COUNTS).write_text(json.dumps({"last": counts, "total": total}))
