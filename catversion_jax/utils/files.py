"""Files that are written completely or not at all, and JSON that is checked when it is read."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import UserError


def expand(path: str | Path) -> Path:
    """Expands a leading ~, which a shell leaves alone inside --flag=~/folder."""
    return Path(path).expanduser()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file beside `path`, flushes it to disk and renames it to `path`.

    A crash or a full disk leaves the old file, or none. An OSError names `path`.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp creates files that only their owner may read.
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, expected: str = "expected a JSON file") -> Any:
    """Returns the contents of a JSON file. Raises UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {expected}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {expected}") from error


def json_lines(path: Path) -> Iterator[dict]:
    """Yields the objects of a JSON Lines file, if it exists; skips lines that are not JSON (cut by a crash)."""
    if path.is_file():
        with path.open() as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def current_umask() -> int:
    # The system reports the umask only when it is set.
    mask = os.umask(0)
    os.umask(mask)
    return mask
