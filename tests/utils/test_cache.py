"""The compilation cache: one's own folder, whole entries, counts that are lost rather than in the way."""

import os
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

from catversion_jax.utils import cache, cache_entries


def entries(folder: Path) -> set[str]:
    return {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in "abcd":
        (tmp_path / f"{name}-cache").write_bytes(zlib.compress(name.encode() * 100))
    assert cache_entries.check(tmp_path) == 0
    return tmp_path


def test_whole_entries_stay(folder):
    assert cache_entries.check(folder) == 0
    assert entries(folder) == set("abcd")


def test_damaged_entries_go(folder):
    """One cut by a full disk, one with a flipped bit that decompresses all the same, and one cut before its digest."""
    (folder / "a-cache").write_bytes((folder / "a-cache").read_bytes()[:-3])
    (folder / "b-cache").write_bytes(zlib.compress(b"other"))
    (folder / "e-cache").write_bytes(zlib.compress(b"e" * 100)[:-3])
    (folder / "f-cache").write_bytes(zlib.compress(b"f" * 100))  # of a process that was killed
    assert cache_entries.check(folder) == 3
    assert entries(folder) == set("cdf")
    assert cache_entries.check(folder) == 0


@pytest.mark.parametrize("text", ["", "[", "[]", '{"a-cache": 7}', "\0"])
def test_damaged_digests(folder, text):
    (folder / cache_entries.SEALS).write_text(text)
    assert cache_entries.check(folder) == 0
    assert entries(folder) == set("abcd")


def test_a_cut_entry_is_repaired(tmp_path):
    """The process after the one that found it compiles nothing."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    code = "from catversion_jax.utils import cache; cache.enable(); import jax; print(jax.jit(lambda x: x * 3 + 1)(2))"

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "7"
        return done.stderr

    run()
    written = {path: path.read_bytes() for path in (tmp_path / "xla").glob("*-cache")}
    assert written
    for path, data in written.items():
        path.write_bytes(data[: len(data) // 2])
    assert f"{len(written)} compiled programs were damaged and are removed" in run()
    assert {path: len(path.read_bytes()) for path in written} == {path: len(data) for path, data in written.items()}
    assert run() == ""


def test_a_folder_that_others_may_write(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert cache.make_private(tmp_path / "open") == f"others may write there; chmod go-w {tmp_path / 'open'}"
    assert cache.make_private(tmp_path / "new" / "er") is None
    assert (tmp_path / "new" / "er").stat().st_mode & 0o777 == 0o700
    if os.getuid() == 0:
        os.chown(tmp_path / "new", 54321, -1)
        assert cache.make_private(tmp_path / "new") == "it belongs to user 54321"
    (tmp_path / "file").write_text("")
    assert "Not a directory" in str(cache.make_private(tmp_path / "file" / "x"))


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache.home().name == f"catversion_jax-{os.getuid()}"


@pytest.mark.parametrize("text", ["", "[]", "7", '{"total": 7}', '{"total": {"hits": "x"}}', "\xff", "[" * 10**5])
def test_damaged_counts(tmp_path, text):
    (tmp_path / cache.COUNTS).write_text(text, "latin-1")
    assert cache.read_counts(tmp_path) == cache.Counts()
    cache.note(tmp_path, Counter(hits=2))
    assert cache.read_counts(tmp_path) == cache.Counts({"hits": 2}, {"hits": 2})


def test_what_cannot_be_judged_stays(folder):
    """Entries of an environment with zstandard, which shares the folder; pipes and links to devices are not opened."""
    (folder / "z-cache").write_bytes(cache_entries.ZSTANDARD + b"not here")
    (folder / "y-cache").write_bytes(b"of a version to come")
    os.mkfifo(folder / "pipe-cache")
    (folder / "zero-cache").symlink_to("/dev/zero")
    assert cache_entries.check(folder) == 0
    assert entries(folder) == {*"abcdyz", "pipe", "zero"}


def test_counts_follow_no_link(tmp_path):
    (tmp_path / "mine").write_text("precious")
    for name in (cache.COUNTS, cache_entries.SEALS):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    (tmp_path / "a-cache").write_bytes(zlib.compress(b"a"))
    cache.note(tmp_path, Counter(hits=1))
    assert (tmp_path / "mine").read_text() == "precious"
