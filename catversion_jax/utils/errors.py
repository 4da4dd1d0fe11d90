"""The two errors that end a command with one line: a user's mistake and a storage failure."""

import contextlib
import errno
import os
import unicodedata
from collections.abc import Iterable, Iterator

BUSY_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS}
"""Errors of a machine that has too many files or connections open."""
STORAGE_ERRNOS = BUSY_ERRNOS | {
    getattr(errno, name)
    for name in ("EDQUOT", "EFBIG", "EIO", "ENODEV", "ENOSPC", "ENXIO", "EREMOTEIO", "EROFS", "ESTALE", "ETIMEDOUT")
    if hasattr(errno, name)  # not every system has all of them
}
"""Errors of a full, failing or unreachable disk, and of a busy machine: the same command may succeed later."""
STORAGE_WORDS = (*map(os.strerror, STORAGE_ERRNOS), "random_device")
"""How libraries quote these errors; the last is C++'s own random numbers, which open a file."""

MOST_CHARACTERS = 1200
"""The longest message: some lines of a terminal. What is longer is cut in its middle."""
LISTED = 5
"""Names that a message lists before it counts the rest."""
UNPRINTABLE = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
"""Unicode's categories of control and formatting characters, lone surrogates, and line and paragraph separators."""


class ReportedError(Exception):
    """An error that a command prints as one line, without a traceback.

    The message names the file, key or shape, and says what was expected and what to do. It may quote what files and
    people gave: characters that would move a terminal's cursor or begin a new line are shown as escapes.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class UserError(ReportedError):
    """A user's mistake; the command exits with status 1."""


class StorageError(ReportedError):
    """A storage failure; the command exits with status 74 and may succeed if it is run again."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a training inside a larger work, which ends too; the command exits with 128 + its number."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """Returns a text that is safe to print: control characters as escapes, and cut in its middle after `most`."""
    if len(text) > 2 * most:  # escaping a text of megabytes first would take a while
        text = text[:most] + text[-most:]
    shown = "".join(c.encode("unicode_escape").decode() if is_unprintable(c) else c for c in text)
    if len(shown) <= most:
        return shown
    # The end is kept, because it says what to do.
    return f"{shown[: most // 2]} [...] {shown[-(most // 2) :]}"


def is_unprintable(character: str) -> bool:
    return not (" " <= character <= "~") and unicodedata.category(character) in UNPRINTABLE


def listed(names: Iterable[object], most: int = LISTED, between: str = ", ") -> str:
    """Returns the first `most` names, separated by commas or by `between`, and how many more there are."""
    every = [one_line(str(name), 200) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return between.join(every[:most]) + more


def short(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the error's type if it has no message."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 200)


def is_storage_error(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is a storage failure rather than a user's mistake.

    Libraries that report what the system said in a type of their own are recognised by the system's words.
    """
    if error is None or isinstance(error, StorageError):
        return error is not None
    if isinstance(error, ReportedError):  # whose text quotes what people gave
        return is_storage_error(error.__cause__)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in STORAGE_ERRNOS
    said = str(error)
    return any(words in said for words in STORAGE_WORDS) or is_storage_error(error.__cause__ or error.__context__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or a device's memory was too small."""
    # XLA's words for a device's memory, and for the host's.
    said = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def kind_of(error: BaseException) -> type[UserError] | type[StorageError]:
    """Returns the error to raise for a library's error: StorageError for a storage failure, else UserError."""
    return StorageError if is_storage_error(error) else UserError


@contextlib.contextmanager
def refused(what: str, todo: str) -> Iterator[None]:
    """Raises UserError(`what` (the system's words); `todo`) for an OSError that is no storage failure."""
    try:
        yield
    except OSError as error:
        if is_storage_error(error):
            raise
        raise UserError(f"{what} ({error.strerror or short(error)}); {todo}") from error


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """Puts `where`, such as a file's name, in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def reason(error: BaseException) -> str:
    """Returns what is said of an error to whoever asked for what failed by it: a UserError's line, or its kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {short(error)}"
