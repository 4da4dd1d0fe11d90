"""XLA's persistent compilation cache, enabled by default, with a count of its hits and misses.

What is in a cache is code. So its folder has to be the person's own, and its entries are sealed: cache_entries.py.
"""

import atexit
import contextlib
import os
import stat
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import jax
import msgspec

from catversion_jax.utils import cache_entries, records
from catversion_jax.utils.errors import StorageError, UserError, short
from catversion_jax.utils.files import refuse_link, write_atomically
from catversion_jax.utils.log import warn

COUNTS = "catversion_counts.json"
EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}


class Counts(msgspec.Struct):
    """Hits and misses of the last process that compiled anything, and of all processes."""

    last: dict[str, int] = {}
    total: dict[str, int] = {}


def home() -> Path:
    """This package's folder in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).

    A user without a home, as in some containers, has it in the folder for temporary files.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "catversion_jax"
    try:
        return Path.home() / ".cache" / "catversion_jax"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"catversion_jax-{os.getuid()}"


def folder() -> Path:
    """The folder of compiled programs: $JAX_COMPILATION_CACHE_DIR or, if that is unset, our own."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home() / "xla").expanduser()


def make_private(path: Path) -> str | None:
    """Makes a folder for code or weights, for the user alone. Returns why it may not be used, None if it may.

    Somebody else who can write there could make this process run their code.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.stat()
    except OSError as error:  # a read-only home, for example
        return short(error)
    if facts.st_uid not in (os.getuid(), 0):
        return f"it belongs to user {facts.st_uid}"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write there; chmod go-w {path}"
    return None


def enable() -> None:
    """Keeps compiled programs between runs; at exit, records this process's hits and misses for `doctor`."""
    if "://" in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):  # a bucket, whose owner and digests are not ours
        return
    path = folder()
    if reason := make_private(path):
        warn(f"{path}: not used to keep compiled programs: {reason}")
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if damaged := cache_entries.check(path):
        warn(f"{path}: {damaged} compiled programs were damaged and are removed; they are compiled again")
    # On a full disk it would show a warning of several lines for every program; `note` counts them in one.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX's default keeps only programs that took at least 1 s to compile; the many small ones add up at each start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    counts: Counter[str] = Counter()

    def listen(event: str, **_) -> None:
        if event in EVENTS:
            counts[EVENTS[event]] += 1

    jax.monitoring.register_event_listener(listen)
    atexit.register(note, path, counts)


def read_counts(path: Path) -> Counts:
    """Returns the counts in the cache folder `path`; none if the file is missing or damaged."""
    with contextlib.suppress(UserError, OSError):
        return records.read_record(path / COUNTS, Counts)
    return Counts()


def note(path: Path, counts: Counter) -> None:
    if counts:
        total = Counter(read_counts(path).total) + counts
        with contextlib.suppress(OSError, UserError, StorageError):  # a lost count is not worth an error
            refuse_link(path / COUNTS)
            text = records.encode(Counts(dict(counts), dict(total)))
            write_atomically(path / COUNTS, lambda file: file.write_text(text))
        if failed := cache_entries.check(path):
            warn(f"{path}: {failed} compiled programs could not be kept; make room there")
