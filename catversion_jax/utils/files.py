"""Files that are read within limits, and files that are written completely or not at all."""

import io
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from catversion_jax.utils.errors import UserError, refused
from catversion_jax.utils.paths import AnyPath, size_of, upload

BOM = b"\xef\xbb\xbf"
MIB = 2**20
MOST_REMOTE = 1024 * MIB
"""The largest file of a bucket that is read at once; models are copied instead."""


def open_regular(path: AnyPath, expected: str = "expected a file") -> BinaryIO | IO[Any]:
    """Opens a regular file for reading. Raises UserError for anything else: a device or a pipe may never end."""
    if not isinstance(path, Path):
        with refused(f"{path}: cannot be read", expected):
            if (size := size_of(path)) > MOST_REMOTE:
                raise UserError(f"{path}: {size // MIB} MiB; {expected} of at most {MOST_REMOTE // MIB} MiB")
            return io.BytesIO(path.read_bytes())  # whole: a reader that asks again may find another object
    with refused(f"{path}: cannot be read", expected):
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: not a regular file; {expected}")
    return os.fdopen(handle, "rb")


def read_bytes(path: AnyPath, limit: int, expected: str) -> bytes:
    """Returns the contents of a regular file. Raises UserError if it cannot be read or has more than `limit` bytes."""
    with open_regular(path, expected) as file, refused(f"{path}: cannot be read", expected):
        try:
            data = file.read(limit + 1)
        except OSError as error:  # of reading, which does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error
    if len(data) > limit:
        size = f"{limit // MIB} MiB" if limit >= MIB else f"{limit} bytes"
        raise UserError(f"{path}: larger than {size}; {expected}")
    return data


def read_text(path: AnyPath, limit: int, expected: str) -> str:
    """Returns the text of a UTF-8 file, with or without a byte order mark. Raises UserError for anything else."""
    try:
        return read_bytes(path, limit, expected).removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; {expected}; save it as UTF-8") from None


def write_atomically(path: AnyPath, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file beside `path`, flushes it to disk and renames it to `path`.

    A crash or a full disk leaves the old file, or none. A symbolic link stays, and the file that it names is replaced.
    In a bucket it is one object, put from a temporary file of this machine. An OSError names `path`. Raises UserError
    if `path` is something else than a regular file.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            upload(temporary, path)
        return
    target = checked_output(path)
    temporary = unused_name(target)
    try:
        # Made here and exclusively, with the mode that the umask leaves; `write` then overwrites it.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        write(temporary)
        temporary.chmod(mode)  # a library may have replaced the file by one for its owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def checked_output(path: Path) -> Path:
    """Returns the file that a path stands for, through symbolic links.

    Raises UserError if it is there and no regular file: replacing a device or a folder would break it.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file; expected the name of a file to write")
    return target


def check_writable(path: AnyPath) -> None:
    """Raises an error, as `write_atomically` would, unless a file can be written at `path`; leaves it as it is."""
    if not isinstance(path, Path):
        probe = path.parent / f".{secrets.token_hex(8)}"
        write_atomically(probe, Path.touch)
        probe.unlink()
        return
    target = checked_output(path)
    with refused(f"{path}: cannot be written", "choose another folder"):
        os.close(os.open(temporary := unused_name(target), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        temporary.unlink()


def unused_name(target: Path) -> Path:
    """Returns the name of a temporary file beside `target`, of a length of its own: that may have the longest name."""
    return target.parent / f".{secrets.token_hex(8)}{target.suffix[-16:]}"


def open_own(path: Path, flags: int) -> int:
    """Opens a lock, counter or log file of ours, which is made if need be; returns its descriptor.

    Raises UserError for a symbolic link, which somebody else may have put there in a shared folder.
    """
    refuse_link(path)
    # O_NOFOLLOW: for a link that is made after that look.
    handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: not a regular file; remove it")
    return handle


def refuse_link(path: Path) -> None:
    """Raises UserError if a file of ours is a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path}: a symbolic link; expected a file of ours; remove the link")
