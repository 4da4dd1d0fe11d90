"""Files: what is read is a regular file of a limited size, what is written never replaces anything else."""

import os
import threading
from pathlib import Path

import pytest

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import open_own, open_regular, read_bytes, read_text, write_atomically
from catversion_jax.utils.paths import expand


def write(path, text: str = "new") -> None:
    write_atomically(path, lambda file: file.write_text(text))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nosuchuser/x", "~nosuchuser/x: .*; write the folder out"),
        ("a\0b", r"a\\x00b: not a path, as it holds a NUL"),
        ("half \ud800", "half of a character"),
    ],
)
def test_what_is_no_path(path, message):
    with pytest.raises(UserError, match=message):
        expand(path)


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(expand("~/x")) == "/home/me/x"


def test_not_regular(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # that nobody writes to: opening it must not wait
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(UserError, match="not a regular file; expected a thing"):
            open_regular(path, "expected a thing")
    with pytest.raises(UserError, match=r"nowhere: cannot be read \(No such file or directory\); expected a thing"):
        read_bytes(tmp_path / "nowhere", 10, "expected a thing")


def test_limits(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10, "y") == b"x" * 10
    with pytest.raises(UserError, match="a: larger than 9 bytes; y"):
        read_bytes(path, 9, "y")


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9")
    assert read_text(path, 100, "y") == "a café"
    path.write_bytes("a café".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 0; y; save it as UTF-8"):
        read_text(path, 100, "y")


def test_devices_stay(tmp_path):
    """As root, --out=/dev/null would otherwise become a file."""
    before = os.stat("/dev/null")
    for path in (tmp_path / "link", tmp_path / "folder", tmp_path / "pipe"):
        if path.name == "link":
            path.symlink_to("/dev/null")
        elif path.name == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        with pytest.raises(UserError, match="not a regular file; expected the name of a file to write"):
            write(path)
    with pytest.raises(UserError, match="/dev/null: not a regular file"):
        write_atomically(type(tmp_path)("/dev/null"), lambda file: file.write_text("x"))
    assert os.stat("/dev/null").st_rdev == before.st_rdev
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_a_link_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "target").write_text("old")
    (tmp_path / "link").symlink_to("folder/target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "target").read_text() == "new"
    (tmp_path / "dangling").symlink_to("not/there")
    with pytest.raises(OSError, match="dangling"):
        write(tmp_path / "dangling")


def test_the_longest_name(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    write(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_umask_is_not_touched(tmp_path, monkeypatch):
    """It belongs to the whole process: another thread that writes meanwhile would make files for everybody."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changed"))
        threads = [threading.Thread(target=write, args=(tmp_path / f"{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_locks_follow_no_links(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="lock: a symbolic link; expected a file of ours; remove the link"):
        open_own(tmp_path / "lock", os.O_WRONLY | os.O_TRUNC)
    assert (tmp_path / "mine").read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        open_own(tmp_path / "pipe", os.O_RDWR)
