"""A run's folder: one process at a time, one config, and what was stored in it is what is read."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catversion_jax.config import Config
from catversion_jax.data import dataset
from catversion_jax.training import run as training_run
from catversion_jax.training.distributed import Process
from catversion_jax.training.run_dir import RunDir
from catversion_jax.utils import locks
from catversion_jax.utils.errors import UserError
from tests.commands import ENVIRONMENT, ROOT
from tests.training.test_checkpoints import write


@pytest.fixture
def config(tmp_path) -> Config:
    """A run on two photos."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "ab":
        paint(photos / f"{name}.png", seed=ord(name))
    return Config().replaced({"run_dir": str(tmp_path / "run"), "data.dir": str(photos)})


def paint(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(path)


def claimed(config: Config) -> RunDir:
    run = RunDir.of(config)
    with run.held(config):
        pass
    return run


def read(config: Config) -> list:
    return training_run.photos_of(RunDir.of(config), config, 16)


def stored(config: Config) -> RunDir:
    """A run that has stored its photos and taken no step."""
    run = claimed(config)
    training_run.store(run, read(config))
    return run


def test_two_trains(config):
    """The second is refused before it writes anything, and may begin once the first has ended."""
    run = RunDir.of(config)
    with run.held(config):
        before = {path: path.read_bytes() for path in run.path.iterdir()}
        with pytest.raises(UserError, match=r"run: another process trains here; wait for it, or choose another"):
            claimed(config.replaced({"seed": 1}))
        with pytest.raises(UserError, match="another process trains here"), run.shared(config, Process()):
            pass
        assert before.items() <= {path: path.read_bytes() for path in run.path.iterdir()}.items()
    claimed(config)


def test_the_lock_dies_with_its_process(config):
    script = f"""
import os, signal
from catversion_jax.config import Config
from catversion_jax.training.run_dir import RunDir
config = Config().replaced({{"run_dir": {config.run_dir!r}}})
with RunDir.of(config).held(config):
    print("held", flush=True)
    signal.pause()
"""
    run = [sys.executable, "-c", script]
    with subprocess.Popen(run, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains here"):
            claimed(config)
        process.kill()
    with RunDir.of(config).lock(".lock") as lock:
        assert lock.take()


def test_the_processes_of_a_batch(config, monkeypatch):
    """They share a folder; two with one index do not, nor does a train among them."""
    monkeypatch.setattr("catversion_jax.training.run_dir.PATIENCE", 0.1)
    run = RunDir.of(config)
    with run.shared(config, Process(0, 2)), run.shared(config, Process(1, 2)), run.shared(config, Process(0, 3)):
        again = run.shared(config, Process(1, 2))
        with pytest.raises(UserError, match=r"process 1 of 2 is at work here already; .* another --process_id"), again:
            pass
        with pytest.raises(UserError, match="another process trains here"):
            claimed(config)
        other = run.shared(config.replaced({"seed": 1}), Process(1, 4))
        with pytest.raises(UserError, match="belongs to another config"), other:
            pass
    claimed(config)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(config, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    claimed(config)
    with RunDir.of(config).shared(config, Process()):
        pass
    (warning,) = caplog.messages
    assert warning.startswith(f"{config.run_dir}: its file system has no locks ({os.strerror(number)}); make sure that")


def test_a_link_in_place_of_the_lock(config, tmp_path):
    """Somebody else may have put it into a shared folder: it is not followed."""
    run = RunDir.of(config)
    run.path.mkdir()
    (run.path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"\.lock: a symbolic link; expected a file of ours"):
        claimed(config)
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_that_took_no_step_holds_nothing(config, caplog):
    """Another config may have its folder; what the first one left there is replaced."""
    run = stored(config)
    run.class_latents.write_bytes(b"of another seed")
    (run.path / "notes.txt").write_text("mine")
    write(run.checkpoints, steps=(0,))  # after a loss that was not finite
    other = config.replaced({"train.batch_size": 1})
    for resume in (False, True):
        run.check(other, resume)
    claimed(other)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "config.json", "notes.txt"]
    assert json.loads(run.config.read_text())["train.batch_size"] == 1
    assert caplog.messages == [f"{run.path}: held another config, whose run took no step; replaced"]
    with pytest.raises(UserError, match="holds a run already; resume it"):
        run.check(other, resume=False)


TRACES = {
    "a checkpoint": lambda run: write(run.checkpoints, steps=(4,)),
    "a batch's checkpoint": lambda run: write(run.checkpoints / "0-of-1", steps=(4,)),
    "metrics": lambda run: run.metrics.write_text('{"step":1}\n'),
    "a concept": lambda run: run.artifact.touch(),
    "a batch's concept": lambda run: ((run.path / "a").mkdir(), (run.path / "a" / run.artifact.name).touch()),
}


@pytest.mark.parametrize("trace", TRACES)
def test_a_run_that_took_a_step_holds_its_folder(config, trace):
    run = stored(config)
    TRACES[trace](run)
    other = config.replaced({"train.batch_size": 1})
    with pytest.raises(UserError, match=r"belongs to another config \(train\.batch_size: 2 there, 1 here\)"):
        run.check(other, resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        run.check(other, resume=False)
    with pytest.raises(UserError, match="belongs to another config"):
        claimed(other)
    claimed(config)


def test_the_folder_of_another_program(config):
    """Its config.json is not ours to replace."""
    run = RunDir.of(config)
    run.path.mkdir()
    run.config.write_text('{"hidden_size": 32}')
    run.data.mkdir()
    with pytest.raises(UserError, match="belongs to another config"):
        run.check(config, resume=True)
    with pytest.raises(UserError, match="belongs to another config"):
        claimed(config)
    assert run.config.read_text() == '{"hidden_size": 32}'
    assert run.data.is_dir()


def test_a_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*; choose another run_dir"):
        claimed(config.replaced({"run_dir": str(tmp_path / "file" / "run")}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "a flipped bit": lambda data: flip(next(data.rglob("*.array_record*"))),
    "a cut file": lambda data: os.truncate(next(data.rglob("*.array_record*")), 100),
    "a missing file": lambda data: next(data.rglob("*.array_record*")).unlink(),
    "another count": lambda data: [
        path.write_text(path.read_text().replace('"2"', '"1"')) for path in data.rglob("dataset_info.json")
    ],
    "a pipe": lambda data: replace_by_pipe(next(data.rglob("dataset_info.json"))),
    "no folder": lambda data: data.rename(data.with_name("elsewhere")),
    "another digest": lambda data: (data / "digest.json").write_text('{"sha256": "0"}'),
    "a digest of another kind": lambda data: (data / "digest.json").write_text("[1]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_photos_are_never_replaced_after_a_step(config, kind):
    """Whatever the folder of photos holds now is another concept."""
    run = stored(config)
    write(run.checkpoints, steps=(4,))
    assert [photo.name for photo in read(config)] == ["a", "b"]
    DAMAGE[kind](run.data)
    with pytest.raises(UserError) as error:
        read(config)
    assert str(error.value).startswith(f"{run.data}: not a readable photo dataset (")
    assert str(error.value).endswith("); restore the folder from a copy, or start the run anew in another run_dir")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_photos_before_the_first_step(config, caplog, kind):
    """Nothing was learned from them: they are read anew, with a warning."""
    run = stored(config)
    DAMAGE[kind](run.data)
    training_run.store(run, read(config))
    assert [photo.name for photo in dataset.read_dataset(run.data)] == ["a", "b"]
    assert len(caplog.messages) == (kind != "no folder")
    assert all("as no step was taken, they are stored anew" in message for message in caplog.messages)


def test_photos_that_changed(config, caplog):
    """Before the first step the run takes those of now and says so, after it those that it stored."""
    run = stored(config)
    paint(Path(config.data.dir) / "c.png", seed=3)
    training_run.store(run, read(config))
    assert [photo.name for photo in dataset.read_dataset(run.data)] == ["a", "b", "c"]
    assert "not the photos of now" in caplog.text
    write(run.checkpoints, steps=(4,))
    (Path(config.data.dir) / "c.png").unlink()
    assert [photo.name for photo in read(config)] == ["a", "b", "c"]


def test_photos_that_are_gone(config, caplog):
    """A run that stored them and took no step yet still has them."""
    stored(config)
    for path in Path(config.data.dir).iterdir():
        path.unlink()
    assert [photo.name for photo in read(config)] == ["a", "b"]
    assert "no photos any more; those that were stored in" in caplog.text
    with pytest.raises(UserError, match="0 photos; expected 1 to 100"):
        read(config.replaced({"seed": 1}))


def test_a_dataset_without_a_digest_is_read(config):
    """As all were before there was one."""
    run = stored(config)
    write(run.checkpoints, steps=(4,))
    (run.data / "digest.json").unlink()
    assert [photo.name for photo in read(config)] == ["a", "b"]


def test_a_name_that_is_not_utf8(tmp_path):
    photo = dataset.Photo(os.fsdecode(b"caf\xe9"), np.zeros((4, 4, 3), np.uint8), None)
    dataset.write_dataset(tmp_path, [photo])
    assert dataset.read_dataset(tmp_path)[0].name == photo.name


def test_out_of_memory(config, monkeypatch, tiny_pipeline):
    """One line that names what to lower; the folder is free for the next try."""

    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.\nand more")

    monkeypatch.setattr(training_run, "prepare", exhausted)
    config = config.replaced({"concept.class_word": "teapot"})
    run = RunDir.of(config)
    with pytest.raises(UserError) as error:
        training_run.train(config, run, tiny_pipeline)
    assert str(error.value) == (
        "out of memory (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.); lower train.batch_size "
        "(2), or set train.remat=True or a narrower model.dtype"
    )
    run.check(config.replaced({"train.batch_size": 1}), resume=False)
