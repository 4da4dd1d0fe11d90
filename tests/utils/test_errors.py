"""Messages: one line, whatever they quote."""

import errno

import pytest

from catversion_jax.utils.errors import (
    StorageError,
    UserError,
    is_out_of_memory,
    is_storage_error,
    kind_of,
    listed,
    one_line,
    refused,
    short,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rcatversion: done", r"a\rcatversion: done"),
        ("file\u202egnp.exe", r"file\u202egnp.exe"),
        ("line\u2028separator", r"line\u2028separator"),
        ("half \udcff", r"half \udcff"),
        ("zero\u200bwidth", r"zero\u200bwidth"),
        ("Teekännchen 茶 🫖", "Teekännchen 茶 🫖"),
    ],
)
def test_one_line(text, shown):
    assert one_line(text) == shown
    for kind in (UserError, StorageError):
        assert str(kind(text)) == shown


def test_long_messages_keep_their_ends():
    message = str(UserError("/a/file: " + "x" * 10**6 + "; copy it again"))
    assert len(message) < 1300
    assert message.startswith("/a/file: xxx")
    assert message.endswith("xxx; copy it again")


def test_lists_are_counted():
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(5)) == "0, 1, 2, 3, 4"
    assert listed(range(27_000)) == "0, 1, 2, 3, 4 and 26995 more"
    assert listed(["\x1b[0m"]) == r"\x1b[0m"
    assert len(listed(["x" * 10**5])) < 220


def test_short():
    assert short(ValueError("first\nsecond")) == "first"
    assert short(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        ValueError("NOT_FOUND: Error opening file: Too many open files [os_error_code='24']"),
        # What libstdc++ raises where /dev/urandom cannot be opened.
        ValueError("random_device::random_device(const std::string&): device not available"),
    ],
)
def test_storage_errors(error):
    assert kind_of(error) is StorageError


def test_what_a_mistake_quotes_is_no_storage_error():
    """A file, a word or a URL may be named like an error of the disk."""
    for name in ("random_device.jpg", "Too many open files", "Input/output error"):
        error = UserError(f"{name}: its server answers 404")
        assert not is_storage_error(error)
        error.__cause__ = OSError(errno.EIO, "Input/output error")
        assert is_storage_error(error)
    assert is_storage_error(StorageError("checkpoints: could not be saved"))


def test_a_full_disk_is_no_mistake():
    assert kind_of(PermissionError(errno.EACCES, "Permission denied")) is UserError
    with pytest.raises(OSError, match="No space left"), refused("x", "y"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"x \(Permission denied\); y"), refused("x", "y"):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), True),
        (RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."), True),
        (RuntimeError("INTERNAL: something else"), False),
    ],
)
def test_out_of_memory(error, is_memory):
    assert is_out_of_memory(error) == is_memory
