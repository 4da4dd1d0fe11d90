"""Locks on files, which the system releases when the process ends, however it ends.

A lock that another process holds is told from a file system without locks, where work goes on with a warning.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from catversion_jax.utils.files import open_own
from catversion_jax.utils.log import warn

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system says that has no locks, such as some network and cloud storage."""
PAUSE = 0.05  # seconds between two attempts
EXCLUSIVE, SHARED = fcntl.LOCK_EX, fcntl.LOCK_SH


class FileLock:
    """An open lock file. Exclusive: for one holder alone; shared: for many, while none is exclusive."""

    def __init__(self, path: Path):
        """Opens the file, which is made if need be; it stays, since removing it could let two processes in."""
        self.path = path
        self._handle = open_own(path, os.O_RDWR)

    def take(self, operation: int = EXCLUSIVE, patience: float = 0) -> bool:
        """Locks the file, or changes a lock that is held; returns False if others hold it for `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            try:
                # flock, not POSIX locks: those end as soon as any part of this process closes the file.
                fcntl.flock(self._handle, operation | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
                time.sleep(PAUSE)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                warn_of_no_locks(self.path.parent, error.strerror)
                return True

    def close(self) -> None:
        os.close(self._handle)


@cache
def warn_of_no_locks(folder: Path, reason: str) -> None:
    """Once for each folder."""
    warn(f"{folder}: its file system has no locks ({reason}); make sure that no two processes do the same work there")


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[FileLock]:
    """Opens a lock file; whatever is held is released at the end."""
    lock = FileLock(path)
    try:
        yield lock
    finally:
        lock.close()
