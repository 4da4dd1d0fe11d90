"""Files that are either whole or not there."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import UserError


def expand(path: str | Path) -> Path:
    """A path as a shell would read it: flags keep a leading ~."""
    return Path(path).expanduser()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file beside `path`, flush it to the disk and rename it: a crash or a full disk leaves the
    old file, or none. An OSError names `path`."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, expected: str = "expected a JSON file") -> Any:
    """What a JSON file holds. Raises UserError if there is none, or something else."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {expected}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {expected}") from None


def json_lines(path: Path) -> Iterator[dict]:
    """What the lines of a file hold, if it is there; a line that a crash cut is left out."""
    if path.is_file():
        with path.open() as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
