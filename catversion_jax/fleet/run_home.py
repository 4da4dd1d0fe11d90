"""A run's folder, in a bucket or on a disk that all nodes share: workers read photos and write results themselves."""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from catversion_jax.config import Config
from catversion_jax.fleet.home import Encoded, Handed, Prepared, Report
from catversion_jax.fleet.work_queue import Task
from catversion_jax.training.checkpoints import Checkpoints, Saved, open_checkpoints
from catversion_jax.training.engine import ConceptJob, Ended, Engine, untrained
from catversion_jax.training.interrupted import InterruptedConcept, read_interrupted
from catversion_jax.training.previews import sample_preview
from catversion_jax.training.results import Results
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.status import FILE_NAME as STATUS
from catversion_jax.training.status import ConceptStatus, read_statuses, write_status
from catversion_jax.training.turn import Turn
from catversion_jax.utils.errors import ReportedError, UserError
from catversion_jax.utils.paths import AnyPath


class RunHome:
    """A worker's side, as fleet/home.py has it."""

    def __init__(self, claimed: str):
        """`claimed` is config.json of the run's folder, as the driver reads it."""
        self.claimed = claimed

    def open(self, worker: str, config: Config) -> Checkpoints:
        run = RunDir.of(config)
        if not run.config.is_file() or run.config.read_text() != self.claimed:
            raise UserError(f"{run.path}: not there; expected a bucket, or a folder that all nodes share")
        self.run = run
        self.read: dict[str, dict[str, InterruptedConcept]] = {}  # what others before had saved, by folder
        return open_checkpoints(run.checkpoints / worker, config.checkpoint.keep, lambda: None)

    def warm_up(self, engine: Engine) -> None:
        config, self.results = engine.config, Results(self.run.path, engine.pipeline, lambda: None)
        if config.batch.previews:
            concept = untrained(config, engine.step_config, engine.pipeline)
            with contextlib.suppress(UserError):  # of prompts that this class word does not fit
                sample_preview(config, engine.pipeline, concept, config.batch.previews)

    def prepare(self, engine: Engine, handed: Handed) -> Prepared:
        """Reads and encodes a concept's photos; `handed.given` names the folders that may have its state."""
        job = handed.job
        data = engine.prepare_source(job.config)
        try:
            saved = [found for name in handed.given if (found := self.saved_in(name, engine).get(job.id)) is not None]
        except ReportedError as error:
            return error
        own = [found for found in saved if found.digest in (None, job.digest)]
        return Encoded(data, max(own, key=lambda found: int(found.state.step[0]), default=None))

    def saved_in(self, folder: str, engine: Engine) -> dict[str, InterruptedConcept]:
        """Returns what a worker or a process that is gone had saved."""
        if folder not in self.read:
            self.read[folder] = read_interrupted([self.run.checkpoints / folder], engine.step_config)
        return self.read[folder]

    def take_turn(self, engine: Engine) -> Turn:
        return Turn(tuple(engine.advance()))

    def end(self, ended: Ended) -> Ended:
        self.results.write(ended)
        return Ended(ended.status, None)

    def saved(self) -> Saved | None:
        return None


@dataclass(frozen=True)
class RunDesk:
    """The driver's side, as fleet/home.py has it."""

    folder: AnyPath
    check: Callable[[], None]

    def given(self, task: Task[ConceptJob]) -> tuple[str, ...]:
        return task.saved_by

    def take(self, report: Report) -> None:
        """Does nothing: the worker has written it."""

    def written(self, jobs: Collection[ConceptJob]) -> list[ConceptStatus]:
        digests = {job.id: job.digest for job in jobs}
        files = (self.folder / concept_id / STATUS for concept_id in digests)
        statuses = read_statuses(path for path in files if path.is_file())
        return [status for status in statuses if status.digest == digests[status.id]]

    def fail(self, status: ConceptStatus) -> None:
        self.check()
        write_status(self.folder / status.id, status)
