"""Checkpoints: what is damaged is noticed and passed over, and what belongs to another process is only read."""

import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import absl.logging
import jax
import numpy as np
import pytest

from catversion_jax.training.checkpoints import LocalCheckpoints, explained, read_newest
from catversion_jax.training.interrupted import read_interrupted
from catversion_jax.training.state import TrainState
from catversion_jax.utils.errors import StorageError, UserError
from catversion_jax.utils.log import LOGGER, warn
from catversion_jax.utils.records import decode

STEPS = (4, 8, 12)
NOTE = {"ids": ["a", None], "digests": ["d", None]}


def state(step: int, count: int = 2) -> TrainState:
    """The states of some concepts; every number depends on the step."""
    numbers = np.random.default_rng(step).normal(size=(count, 64)).astype(np.float32)
    steps, best = np.full(count, step, np.int32), np.full(count, 0.5, np.float32)
    return TrainState(
        steps, np.arange(count, dtype=np.uint32), {"prefix": numbers}, {"mu": numbers / 2}, best, steps * 0
    )


def like(_: dict) -> TrainState:
    return state(0)


def assert_same(ours: TrainState, theirs: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def write(folder: Path, steps=STEPS) -> Path:
    checkpoints = LocalCheckpoints(folder, keep=3)
    for step in steps:
        checkpoints.save(step, state(step), NOTE)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "0-of-2")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """Three good checkpoints."""
    return Path(shutil.copytree(good, tmp_path / "checkpoints" / good.name))


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def metadata(path: Path) -> Path:
    return path / "config" / "metadata"


def empty(path: Path) -> None:
    for file in files(path / "state"):
        file.write_bytes(b"")


def cut(path: Path) -> None:
    for file in files(path / "state"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "empty files": empty,
    "cut files": cut,
    "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "no note": lambda path: shutil.rmtree(path / "config"),
    "a note that is no object": lambda path: metadata(path).write_text("[1]"),
    "a note that is null": lambda path: metadata(path).write_text("null"),
    "a note that is cut": lambda path: metadata(path).write_text('{"ids": ["a"'),
    "a note that is not UTF-8": lambda path: metadata(path).write_bytes(b'{"ids": "\xff"}'),
    "a note that is too deep": lambda path: metadata(path).write_text("[" * 100_000),
    "another note": lambda path: metadata(path).write_text(metadata(path).read_text().replace('"a"', '"b"')),
    "metadata too deep": lambda path: (path / "state" / "_METADATA").write_text("[" * 100_000),
    "metadata without a tree": lambda path: (path / "state" / "_METADATA").write_text("{}"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_falls_back(folder, caplog, kind):
    """To the one before, with one warning; and the steps that are lost can be saved again."""
    DAMAGE[kind](folder / "12")
    step, read, note = read_newest(folder, like)
    assert (step, note) == (8, NOTE)
    assert_same(read, state(8))
    (warning,) = caplog.messages
    assert warning.startswith(f"{folder}/12: not a readable checkpoint (")
    assert warning.endswith("; going on from step 8, the newest that is readable")

    own = LocalCheckpoints(folder, keep=3)
    assert_same(own.restore(state(0)), state(8))
    own.save(12, state(12), NOTE)
    own.close()
    assert (folder / "12.damaged").is_dir()
    assert_same(read_newest(folder, like).state, state(12))


def test_none_is_readable(folder):
    for step in STEPS:
        empty(folder / str(step))
    with pytest.raises(UserError) as error:
        read_newest(folder, like)
    message = str(error.value)
    assert message.startswith(f"{folder}/12, {folder}/8, {folder}/4: not a readable checkpoint (")
    assert message.endswith(
        "; no older one is readable; restore the folder from a copy, or remove it to begin at step 0"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["12", "4", "8"]  # nothing is lost by trying


def test_nothing_was_saved(tmp_path):
    assert read_newest(tmp_path / "nowhere", like) is None
    (tmp_path / "7").touch()  # no folder
    assert read_newest(tmp_path, like) is None
    assert LocalCheckpoints(tmp_path / "new", keep=1).restore(state(0)) is None


def test_one_flipped_bit_is_noticed(folder):
    """Wherever it is, in the state or in the note: the numbers are those that were saved, or an older checkpoint's."""
    rng = np.random.default_rng(0)
    noticed = 0
    for file in [*files(folder / "12" / "state"), metadata(folder / "12")]:
        data = file.read_bytes()
        for _ in range(4 if data else 0):
            bit = int(rng.integers(8 * len(data)))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            saved = read_newest(folder, like)
            assert_same(saved.state, state(saved.step))
            assert saved.note["ids"] == NOTE["ids"]
            noticed += saved.step == 8
        file.write_bytes(data)
    assert noticed > 10


def test_one_without_a_digest_is_read(folder):
    """As all were before there was one."""
    path = metadata(folder / "12")
    note = json.loads(path.read_text())
    assert len(note.pop("digest")) == 64
    path.write_text(json.dumps(note))
    assert_same(read_newest(folder, like).state, state(12))


def test_a_sibling_that_is_saving_is_left_alone(folder):
    """The folder that Orbax is writing to; only its owner removes it, when it starts again after a crash."""
    saving = Path(shutil.copytree(folder / "12", folder / "16.orbax-checkpoint-tmp"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    step_config = SimpleNamespace(init_state=lambda seeds: jax.tree.map(np.asarray, state(0, len(seeds))))
    for _ in range(3):
        concepts = read_interrupted([folder], step_config)
    assert concepts.keys() == {"a"}
    assert (concepts["a"].digest, int(concepts["a"].state.step[0])) == ("d", 12)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    own = LocalCheckpoints(folder, keep=3)
    own.save(20, state(20), NOTE)
    own.close()
    assert not saving.exists()


def test_one_broken_folder_stops_nobody(folder, caplog):
    broken = write(folder.parent / "1-of-2", steps=(4,))
    metadata(broken / "4").write_text("7")
    step_config = SimpleNamespace(init_state=lambda seeds: jax.tree.map(np.asarray, state(0, len(seeds))))
    concepts = read_interrupted([broken, folder], step_config)
    assert concepts.keys() == {"a"}
    assert f"{broken}/4: not a readable checkpoint" in caplog.text
    assert "going on without it: its concepts begin anew" in caplog.text


def test_a_failing_disk_is_no_damage(folder, monkeypatch):
    """It may be well again later: nothing is passed over."""

    def broken(*_):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("catversion_jax.training.checkpoints.read_record", broken)
    with pytest.raises(StorageError, match=r"12: could not be read .*Input/output error"):
        read_newest(folder, like)


@pytest.mark.parametrize(
    ("error", "kind", "todo"),
    [
        (OSError(28, os.strerror(28)), StorageError, "; make room, or mend the disk, and resume"),
        (ValueError("NOT_FOUND: x [File too large]"), StorageError, "; make room, or mend the disk, and resume"),
        (PermissionError(13, os.strerror(13)), UserError, "; grant access, and resume"),
        (ValueError("PERMISSION_DENIED: Permission denied"), UserError, "; grant access, and resume"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), UserError, "; --debug shows where; what was saved before"),
    ],
)
def test_the_advice_fits_the_error(error, kind, todo):
    with pytest.raises(kind) as found, explained("x: could not save"):
        raise error
    assert str(found.value).startswith("x: could not save (")
    assert todo in str(found.value)


def test_no_library_mutes_warnings(caplog):
    """Ours, and those that others log through absl; what Orbax logs of every save is not heard."""
    absl_logger = logging.getLogger("absl")
    assert absl_logger.isEnabledFor(logging.WARNING)
    absl.logging.set_verbosity(absl.logging.FATAL)
    warn("of ours")
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl_logger.warning("of another")
    record = absl_logger.makeRecord("absl", logging.ERROR, "/x/orbax/checkpoint/y.py", 1, "of Orbax", (), None)
    absl_logger.handle(record)
    assert LOGGER.isEnabledFor(logging.WARNING)
    assert caplog.messages == ["of ours", "of another"]


def test_notes_are_json(folder):
    assert decode(metadata(folder / "4").read_bytes(), dict, "x", "y").keys() == {"ids", "digests", "digest"}
