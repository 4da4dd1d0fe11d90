"""A run's folder: whose config it belongs to, what lies where, and whether it is finished."""

import json
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from catversion_jax import artifact
from catversion_jax.config import default, flat
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically


def plain(config: ConfigDict) -> dict:
    """The config as JSON has it, without the folder's own name, which may change."""
    return json.loads(json.dumps({key: value for key, value in flat(config).items() if key != "run_dir"}))


@dataclass(frozen=True)
class RunDir:
    path: Path

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
        return self.path / artifact.FILE_NAME

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def finished(self) -> bool:
        return self.artifact.is_file() and self.samples.is_file()

    def check(self, config: ConfigDict, resume: bool) -> None:
        """Raise UserError where the folder holds a run that this one must not touch."""
        if not self.config.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path}: a file; config.run_dir takes a folder")
            return
        if not resume:
            raise UserError(f"{self.path}: holds a run already; continue it with --resume, or choose another run_dir")
        try:
            old = plain(default()) | json.loads(self.config.read_text())  # keys newer than the run had their defaults
        except (ValueError, TypeError):
            raise UserError(f"{self.config}: not the JSON of a config; choose another run_dir") from None
        new = plain(config)
        differences = [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differences:
            listed = "; ".join(differences)
            raise UserError(f"{self.path}: belongs to another config ({listed}); give the same one, or another run_dir")

    def claim(self, config: ConfigDict) -> None:
        """Make the folder this config's."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.is_file():
                write_atomically(self.config, lambda path: path.write_text(json.dumps(plain(config), indent=1) + "\n"))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another run_dir") from None
