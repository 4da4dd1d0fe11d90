"""The two errors that end a command with one line: a user's mistake and a storage failure."""

import errno
import os

STORAGE_ERRNOS = {
    getattr(errno, name)
    for name in ("EDQUOT", "EFBIG", "EIO", "ENODEV", "ENOSPC", "ENXIO", "EREMOTEIO", "EROFS", "ESTALE", "ETIMEDOUT")
    if hasattr(errno, name)  # not every system has all of them
}
"""Errors of a full, failing or unreachable disk: the same command may succeed later."""


class UserError(Exception):
    """A user's mistake, printed as one line without a traceback; the command exits with status 1.

    The message names the file, key or shape, and says what was expected and what to do.
    """


class StorageError(Exception):
    """A storage failure, printed as one line; the command exits with status 74 and may succeed if it is run again."""


def short(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the error's type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_storage_error(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is a storage failure rather than a user's mistake.

    Libraries that report what the system said in a type of their own are recognised by the system's words.
    """
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in STORAGE_ERRNOS
    said = str(error)
    return any(os.strerror(code) in said for code in STORAGE_ERRNOS) or is_storage_error(
        error.__cause__ or error.__context__
    )


def kind_of(error: BaseException) -> type[UserError] | type[StorageError]:
    """Returns the error to raise for a library's error: StorageError for a storage failure, else UserError."""
    return StorageError if is_storage_error(error) else UserError
