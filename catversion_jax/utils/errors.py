"""The two kinds of error that end a command in one line: the user's mistake, and storage that failed."""

import errno

STORAGE_ERRNOS = {
    getattr(errno, name)
    for name in ("EDQUOT", "EFBIG", "EIO", "ENODEV", "ENOSPC", "ENXIO", "EREMOTEIO", "EROFS", "ESTALE", "ETIMEDOUT")
    if hasattr(errno, name)  # not every system has all of them
}
"""What the system says of a disk that is full, broken or away: the same command may work later."""


class UserError(Exception):
    """A user's mistake, printed as one line, without a traceback; the command exits with status 1.

    The message names the file, key or shape, says what was expected and what to do.
    """


class StorageError(Exception):
    """Storage that failed, printed as one line; the command exits with status 74, and is worth another try."""


def short(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_forbidden(error: BaseException | None) -> bool:
    """Whether the system refused access, which the user has to grant."""
    return error is not None and (isinstance(error, PermissionError) or is_forbidden(error.__cause__))


def is_storage_error(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is the storage's and not the user's."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in STORAGE_ERRNOS
    return is_storage_error(error.__cause__ or error.__context__)
