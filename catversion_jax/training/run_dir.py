"""A run's folder: its files, the config that it belongs to, and whether the run is finished."""

from dataclasses import dataclass
from pathlib import Path

from catversion_jax.config import Config
from catversion_jax.methods import concept_file
from catversion_jax.utils.errors import UserError, is_storage_error
from catversion_jax.utils.files import expand
from catversion_jax.utils.identity import claim, refuse_another


@dataclass(frozen=True)
class RunDir:
    path: Path

    @classmethod
    def of(cls, config: Config) -> "RunDir":
        """Returns the folder of the config's run."""
        return cls(expand(config.run_dir))

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def class_latents(self) -> Path:
        return self.path / "class_latents.npy"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def artifact(self) -> Path:
        return self.path / concept_file.FILE_NAME

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def finished(self) -> bool:
        return self.artifact.is_file() and self.samples.is_file()

    def check(self, config: Config, resume: bool) -> None:
        """Raises UserError if the folder holds another run, or this run and `resume` is false."""
        if not self.config.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: a file; config.run_dir takes a folder")
            return
        if not resume:
            raise UserError(f"{self.path}: holds a run already; resume it, or choose another run_dir")
        # A run from before a key existed was trained with what is now the key's default.
        refuse_another(self.config, config.identity(), Config().identity())

    def claim(self, config: Config) -> None:
        """Records that the folder belongs to this config. Raises UserError if it cannot be written."""
        try:
            claim(self.config, config.identity(), Config().identity())
        except OSError as error:
            if is_storage_error(error):
                raise
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another run_dir") from error
