"""Orbax checkpoints of the training state, in folders named by step; kilobytes, unless the method trains the UNet.

`Checkpoints` writes to its own folder and cleans it up. `read_newest` only reads, so that the folder may belong to
another process, which may be saving at this moment. In a bucket a checkpoint is one object, STEP.zip with Orbax's
folder in it, which arrives whole or not at all: Orbax's own twenty files would not (and it takes no s3:// URL).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp

from catversion_jax.training.state import TrainState
from catversion_jax.utils import tree
from catversion_jax.utils.errors import (
    StorageError,
    UserError,
    is_out_of_memory,
    is_storage_error,
    kind_of,
    listed,
    refused,
    short,
)
from catversion_jax.utils.log import silence, warn
from catversion_jax.utils.paths import AnyPath, NoAccess, entries, local_copy, upload
from catversion_jax.utils.records import read_record

MOST_DIGITS = 18
"""Digits of a step; a folder with a longer name is none of ours."""
NOTE = Path("config", "metadata")
"""Where a checkpoint's folder has its note."""
DIGEST = "digest"
"""The key of the note under which the digest is saved. Checkpoints that were saved before there was one lack it."""


# It logs several lines for every save, and a traceback for every error, which we report ourselves.
silence("orbax")


def pass_on(unraisable: Any, hook: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Reports an error that nobody can catch, unless it is TensorStore's about a file that was given up already."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


# When a write fails, Orbax ends its event loop, and TensorStore then shows a traceback for each file that is left.
sys.unraisablehook = pass_on


class Saved(NamedTuple):
    """A checkpoint as it was read."""

    step: int
    state: TrainState
    note: dict[str, Any]  # what `Checkpoints.save` was given


class Checkpoints(Protocol):
    """The checkpoints in a folder, which no other process writes to. Saves run in the background; `close` waits."""

    @property
    def latest(self) -> int | None:
        """The step of the newest one; None if there is none."""

    def save(self, step: int, state: TrainState, note: Mapping[str, Any]) -> None:
        """Saves the state and a note under `step`, unless it is there. Earlier checkpoints are kept if the save fails.

        Raises UserError if access is denied, StorageError for other failures.
        """

    def restore(self, like: TrainState) -> TrainState | None:
        """Returns the newest readable state, with the sharding of `like`; None if nothing was saved yet.

        Newer ones, which are damaged, are renamed: the run will save those steps again. Raises as `read_newest`.
        """

    def close(self) -> None:
        """Waits for pending saves. Raises UserError or StorageError, as `save` does, if one of them failed."""


def open_checkpoints(folder: AnyPath, keep: int, check: Callable[[], None]) -> Checkpoints:
    """Returns the checkpoints in a folder of this machine or of a bucket.

    At most `keep` of them are kept. `check` raises StorageError if this process may no longer write there.
    """
    return LocalCheckpoints(folder, keep) if isinstance(folder, Path) else BucketCheckpoints(folder, keep, check)


class LocalCheckpoints:
    """The checkpoints in a folder of this machine."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        # A process that is killed during a save leaves a temporary folder behind, which the next run removes.
        # lightweight_initialize: without it, one damaged checkpoint would keep all others from being opened.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, lightweight_initialize=True
        )
        with explained(f"{self.folder}: could not open the folder of checkpoints"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, note: Mapping[str, Any]) -> None:
        if step == self.latest:
            return
        with_digest = {**note, DIGEST: digest_of(state, note)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(with_digest))
        with explained(f"{self.folder / str(step)}: could not save the checkpoint"):
            self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> TrainState | None:
        state = restore_newest(self.folder, like)
        self._manager.reload()
        return state

    def close(self) -> None:
        try:
            self.wait()
        finally:
            # It raises the same error again, which is being reported.
            with contextlib.suppress(Exception):
                self._manager.close()

    def wait(self) -> None:
        """Waits for pending saves, and raises as `close`."""
        with explained(f"{self.folder}: could not save the last checkpoint"):
            self._manager.wait_until_finished()


class BucketCheckpoints:
    """The checkpoints in a folder of a bucket; each is written to this machine first."""

    def __init__(self, folder: AnyPath, keep: int, check: Callable[[], None]):
        self.folder, self._keep, self._check = folder, keep, check
        self._scratch = tempfile.TemporaryDirectory()
        self._local = LocalCheckpoints(Path(self._scratch.name), 1)
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self.latest = next(iter(saved_steps(folder)), None)

    def save(self, step: int, state: TrainState, note: Mapping[str, Any]) -> None:
        if step == self.latest:
            return
        self._finish()
        self._local.save(step, state, note)
        self._pending = self._pool.submit(self._put, step)
        self.latest = step

    def _put(self, step: int) -> None:
        self._local.wait()
        self._check()
        folder = self._local.folder / str(step)
        with explained(f"{self.folder / str(step)}: could not save the checkpoint"):
            packed = shutil.make_archive(str(folder), "zip", folder)
            upload(Path(packed), checkpoint_path(self.folder, step))
            Path(packed).unlink()
            for old in saved_steps(self.folder)[self._keep :]:
                checkpoint_path(self.folder, old).unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def restore(self, like: TrainState) -> TrainState | None:
        state = restore_newest(self.folder, like)
        self.latest = next(iter(saved_steps(self.folder)), None)
        return state

    def close(self) -> None:
        try:
            self._finish()
            self._local.close()
        finally:
            self._pool.shutdown()
            self._scratch.cleanup()


class HeldCheckpoint:
    """A checkpoint that is held in memory until somebody takes it, as Checkpoints are those of a folder."""

    latest = None

    def __init__(self) -> None:
        self._held: Saved | None = None

    def save(self, step: int, state: TrainState, note: Mapping[str, Any]) -> None:
        # A copy: slots are overwritten in place when a concept enters one.
        self._held = Saved(step, jax.tree.map(np.copy, state), dict(note))

    def take(self) -> Saved | None:
        """Returns what was saved last, once."""
        held, self._held = self._held, None
        return held

    def restore(self, like: TrainState) -> TrainState | None:
        return None

    def close(self) -> None:
        """Has nothing to wait for."""


def restore_newest(folder: AnyPath, like: TrainState) -> TrainState | None:
    """Returns the newest readable state; newer ones, which are damaged, are renamed."""
    saved = read_newest(folder, lambda _: like)
    if saved is None:
        return None
    for step in saved_steps(folder):
        if step > saved.step:
            set_aside(checkpoint_path(folder, step))
    return saved.state


def checkpoint_path(folder: AnyPath, step: int) -> AnyPath:
    """Returns the path of a step's checkpoint: a folder of this machine, or an object of a bucket."""
    return folder.absolute() / str(step) if isinstance(folder, Path) else folder / f"{step}.zip"


def saved_steps(folder: AnyPath) -> list[int]:
    """Returns the steps of the checkpoints in a folder, newest first; none if there is no folder."""
    if isinstance(folder, Path) and not folder.is_dir():
        return []
    try:
        with refused(f"{folder}: cannot be read", "grant access to the checkpoints"):
            found = entries(folder)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    if isinstance(folder, Path):
        names = [path.name for path, is_folder in found if is_folder]
    else:
        names = [path.stem for path, _ in found if path.suffix == ".zip"]
    return sorted((int(name) for name in names if name.isdecimal() and len(name) <= MOST_DIGITS), reverse=True)


def read_newest(folder: AnyPath, like: Callable[[dict[str, Any]], TrainState]) -> Saved | None:
    """Returns the newest readable checkpoint in a folder, None if there is none; nothing is written or removed.

    `like` gives the state's arrays, or shapes with shardings, for a checkpoint's note. Damaged checkpoints are passed
    over with a warning. Raises UserError if none is readable, and StorageError if the disk fails.
    """
    damaged: dict[str, str] = {}  # by path
    for step in saved_steps(folder):
        path = checkpoint_path(folder, step)
        try:
            with unpacked(path) as local:
                saved = Saved(step, *read_checkpoint(local, like))
        except (StorageError, NoAccess):  # which say nothing of the checkpoint
            raise
        # Not OSError alone: a damaged file raises whatever its reader stumbles over.
        except Exception as error:
            if not path.exists():  # its owner has replaced it by a newer one meanwhile
                continue
            if is_storage_error(error) or is_denied(error):
                raise kind_of(error)(f"{path}: could not be read ({short(error)}); {advice(error)}") from error
            if is_out_of_memory(error):
                raise
            damaged[str(path)] = short(error)
            continue
        if damaged:
            warn(f"{damage_of(damaged)}; going on from step {step}, the newest that is readable")
        return saved
    if damaged:
        todo = "restore the folder from a copy, or remove it to begin at step 0"
        raise UserError(f"{damage_of(damaged)}; no older one is readable; {todo}")
    return None


@contextlib.contextmanager
def unpacked(path: AnyPath) -> Iterator[Path]:
    """Gives the folder of a checkpoint, from a bucket as a temporary copy."""
    if isinstance(path, Path):
        yield path
        return
    with local_copy(path) as packed, tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(folder)
        yield Path(folder)


def set_aside(path: AnyPath) -> None:
    """Renames a damaged checkpoint, so that nothing takes it for one; it is kept, as it may be of use."""
    target = path.with_name(f"{path.name}.damaged")
    with explained(f"{path}: could not rename the damaged checkpoint"):
        if isinstance(target, Path):
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
        else:
            path.copy(target, overwrite=True)
            path.unlink()


def damage_of(damaged: Mapping[str, str]) -> str:
    """Names damaged checkpoints, and says what is wrong with the newest."""
    return f"{listed(damaged)}: not a readable checkpoint ({next(iter(damaged.values()))})"


def read_checkpoint(path: Path, like: Callable[[dict[str, Any]], TrainState]) -> tuple[TrainState, dict[str, Any]]:
    """Reads one checkpoint. Raises ValueError if its digest is another, and anything else if a file is damaged."""
    # Item by item, as CheckpointManager lays them out: it would also read all other checkpoints' metadata.
    note = read_record(path / NOTE, dict[str, Any], "expected a checkpoint's note")
    digest = note.pop(DIGEST, None)
    wanted = like(note)
    # Checkpoints of the versions without a digest did not keep the best that was learned either.
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted if digest else wanted.replace(kept=None))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        state = reader.restore(path / "state", args=ocp.args.StandardRestore(shapes))
    if digest is not None and digest != digest_of(state, note):
        raise ValueError("its digest is not that of its contents")
    if digest is None and wanted.kept is not None:
        state = state.replace(kept=state.learned)
    return state, note


def digest_of(state: TrainState, note: Mapping[str, Any]) -> str:
    """Hashes all numbers of a state, and its note."""
    whole = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        whole.update(tree.digest(np.asarray(leaf)))
    return whole.hexdigest()


def is_denied(error: BaseException) -> bool:
    """Whether the system refused access, in its own words or in those of a library that quotes it."""
    return any(os.strerror(number) in str(error) for number in (errno.EACCES, errno.EPERM))


def advice(error: BaseException) -> str:
    """Returns what to do about an error of a storage library."""
    if is_storage_error(error):
        return "make room, or mend the disk, and resume"
    if is_denied(error):
        return "grant access, and resume"
    return "--debug shows where; what was saved before is still there"


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what a storage library raises into a UserError or StorageError of one line."""
    try:
        yield
    except (UserError, StorageError):
        raise
    # Not OSError alone: Orbax and TensorStore wrap the system's error in types of their own.
    except Exception as error:
        raise kind_of(error)(f"{what} ({short(error)}); {advice(error)}") from error
