"""A run's folder: its files, the config that it belongs to, who works in it, and whether it is finished."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catversion_jax.config import Config
from catversion_jax.methods import concept_file
from catversion_jax.training.checkpoints import saved_steps
from catversion_jax.training.distributed import Process
from catversion_jax.training.status import FILE_NAME as STATUS
from catversion_jax.utils.claims import Claim, found_claims, is_held
from catversion_jax.utils.errors import UserError, refused
from catversion_jax.utils.identity import claim, differences, refuse_another
from catversion_jax.utils.locks import SHARED, FileLock, lock_file
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, expand, remove_folder, size_of
from catversion_jax.utils.records import read_record

LOCK = ".lock"
ALONE = "run"
"""The name of the claim on a bucket's folder of who works there alone."""
Check = Callable[[], None]
"""Raises StorageError if another process has taken the folder over."""
OF_RAY = "-of-ray"
"""How the folder of checkpoints of a worker of a Ray cluster ends, where that of a process has how many there are."""
PATIENCE = 10.0
"""Seconds that a process of a batch waits for a sibling that is claiming the folder, which takes milliseconds."""
OTHER = "choose another run_dir"
OF_EVERY_RUN = {"model.path", "train.steps"}
"""Keys that config.json has held from the first."""


@dataclass(frozen=True)
class RunDir:
    path: AnyPath

    @classmethod
    def of(cls, config: Config) -> "RunDir":
        """Returns the folder of the config's run."""
        return cls(expand(config.run_dir))

    @property
    def config(self) -> AnyPath:
        return self.path / "config.json"

    @property
    def data(self) -> AnyPath:
        return self.path / "data"

    @property
    def class_latents(self) -> AnyPath:
        return self.path / "class_latents.npy"

    @property
    def checkpoints(self) -> AnyPath:
        return self.path / "checkpoints"

    @property
    def events(self) -> AnyPath:
        return self.path / "events"

    @property
    def metrics(self) -> AnyPath:
        return self.path / "metrics.jsonl"

    @property
    def tracked(self) -> AnyPath:
        return self.path / ".tracked"

    @property
    def artifact(self) -> AnyPath:
        return self.path / concept_file.FILE_NAME

    @property
    def samples(self) -> AnyPath:
        return self.path / "samples.png"

    @property
    def preview(self) -> AnyPath:
        return self.path / concept_file.PREVIEW

    @property
    def finished(self) -> bool:
        return self.artifact.is_file() and self.samples.is_file()

    def of_process(self, process: Process) -> AnyPath:
        """Returns the folder of checkpoints of one process of a batch."""
        return self.checkpoints / f"{process.index}-of-{process.count}"

    @property
    def of_processes(self) -> list[AnyPath]:
        """The folders of checkpoints of a batch, whichever process made them."""
        return sorted(self.checkpoints.glob("*-of-*"))

    @property
    def has_saved_steps(self) -> bool:
        """Whether there is something to go on from: the state after a step, or a concept, of a run or of a batch."""
        concepts = (self.artifact, *self.path.glob(f"*/{concept_file.FILE_NAME}"))
        # A checkpoint of step 0 is what a loss that was not finite leaves.
        return any(path.is_file() for path in concepts) or any(
            step > 0 for folder in (self.checkpoints, *self.of_processes) for step in saved_steps(folder)
        )

    @property
    def has_progress(self) -> bool:
        """Whether a step was taken here; the folder then belongs to its config for good."""
        return self.has_saved_steps or (self.metrics.is_file() and size_of(self.metrics) > 0)

    def belongs_to(self, config: Config) -> bool:
        """Returns whether the folder was claimed for this config."""
        return self.config.is_file() and not self.differences(config)

    def differences(self, config: Config) -> list[str]:
        # A run from before a key existed was trained with what is now the key's default.
        return differences(self.config, config.identity(), Config().identity())

    def check(self, config: Config, resume: bool) -> None:
        """Raises UserError if the folder holds another run, or this run and `resume` is false.

        A run that took no step holds nothing: another config may replace it.
        """
        if not self.config.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: a file; config.run_dir takes a folder")
            return
        if self.is_replaceable(config):
            return
        if not resume:
            raise UserError(f"{self.path}: holds a run already; resume it, or choose another run_dir")
        refuse_another(self.config, config.identity(), Config().identity())

    def is_replaceable(self, config: Config) -> bool:
        """Returns whether the folder is that of another config of ours whose run never took a step."""
        # The config.json of another program lacks these, and is never touched.
        ours = read_record(self.config, dict[str, Any], "expected a run's config").keys() >= OF_EVERY_RUN
        return ours and bool(self.differences(config)) and not self.has_progress

    @contextlib.contextmanager
    def held(self, config: Config) -> Iterator[Check]:
        """Claims the folder for a run, and keeps it until the end of the context; gives a check that it still does.

        Raises UserError if another process is at work there, or if it cannot be written.
        """
        if not isinstance(self.path, Path):
            with self.claimed(ALONE) as check:
                self.claim(config, alone=True)
                yield check
            return
        with self.lock(LOCK) as lock:
            if not lock.take():
                raise UserError(f"{self.path}: another process trains here; wait for it, or {OTHER}")
            self.claim(config, alone=True)
            yield lambda: None

    @contextlib.contextmanager
    def shared(self, config: Config, process: Process) -> Iterator[Check]:
        """Claims the folder for one of the processes of a batch, as `held` does; other processes may join in."""
        if not isinstance(self.path, Path):
            with self.claimed(f"{process.index}-of-{process.count}", f"-of-{process.count}") as check:
                self.claim(config, alone=False)
                yield check
            return
        with self.lock(LOCK) as folder, self.lock(f"{LOCK}-{process.index}-of-{process.count}") as own:
            alone = folder.take()
            if not alone and not folder.take(SHARED, PATIENCE):
                raise UserError(f"{self.path}: another process trains here; wait for it, or {OTHER}")
            if not own.take():
                which = f"process {process.index} of {process.count} is at work here already"
                raise UserError(f"{self.path}: {which}; wait for it, or give this one another --process_id")
            self.claim(config, alone)
            folder.take(SHARED, PATIENCE)
            yield lambda: None

    @contextlib.contextmanager
    def claimed(self, name: str, with_ending: str = "\0") -> Iterator[Check]:
        """Claims a bucket's folder by a name; others may be at work there whose names have that ending.

        Raises UserError if another process is at work there.
        """
        claim = Claim(self.path, name)
        if not claim.take():
            raise UserError(f"{self.path}: another process trains here (claim {name}); wait for it, or {OTHER}")
        try:
            for other, number in found_claims(self.path):
                if other != name and not other.endswith(with_ending) and is_held(self.path, other, number):
                    raise UserError(
                        f"{self.path}: another process trains here (claim {other}); wait for it, or {OTHER}"
                    )
            yield claim.check
        finally:
            claim.release()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[FileLock]:
        with contextlib.ExitStack() as stack:
            with refused(f"{self.path}: cannot be written", OTHER):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(lock_file(self.path / name))
            yield lock

    def claim(self, config: Config, alone: bool) -> None:
        """Records that the folder belongs to this config. Raises UserError if it belongs to another.

        `alone`: nobody else is at work there, so that what another config left without a step may be replaced.
        """
        with refused(f"{self.path}: cannot be written", OTHER):
            if alone and self.config.is_file() and self.is_replaceable(config):
                warn(f"{self.path}: held another config, whose run took no step; replaced")
                self.clear()
            claim(self.config, config.identity(), Config().identity())

    def clear(self) -> None:
        """Removes what a run leaves before its first step."""
        for folder in (self.data, self.checkpoints, self.events):
            remove_folder(folder)
        for path in (self.class_latents, self.metrics, self.samples, self.tracked, self.path / STATUS, self.config):
            path.unlink(missing_ok=True)
