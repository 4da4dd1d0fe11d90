"""A study: what all rows of a table share, and its rows, each computed once and kept in the study's folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from catversion_jax.config import Config
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.images import open_image
from catversion_jax.methods.concept_file import Concept
from catversion_jax.study.rows import CandidateRow, CurveRow, ScoredRow
from catversion_jax.study.scoring import Scorer, size
from catversion_jax.study.settings import BASE, STRENGTHS, TRIED_ON, Scale, Setting
from catversion_jax.study.training import train_setting
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.identity import claim
from catversion_jax.utils.paths import AnyPath, make_folder
from catversion_jax.utils.records import read_record
from catversion_jax.utils.types import UInt8

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Study:
    """What all settings of a table share."""

    config: Config
    folders: tuple[ConceptFolder, ...]
    scale: Scale
    out: AnyPath
    scorer: Scorer

    def config_of(self, setting: Setting) -> Config:
        # Only the trained concept is used: no validation images, and no checkpoint before the last step.
        config = self.config.replaced(setting.changes)
        steps = self.scale.steps or config.train.steps
        changes = {"train.steps": steps, "sample.every": 0, "checkpoint.every": steps, "checkpoint.keep": 1}
        return config.replaced(changes)

    @property
    def tried_on(self) -> tuple[ConceptFolder, ...]:
        """The concepts by which a method's setting is chosen."""
        return named(self.folders, TRIED_ON)

    def trained(self, setting: Setting, folders: tuple[ConceptFolder, ...]) -> tuple[dict[str, Concept], float | None]:
        return train_setting(self.config_of(setting), folders, self.out / setting.folder, self.scorer.pipeline)

    def claim(self) -> None:
        """Records that the folder belongs to this study. Raises UserError if it belongs to another."""
        photos = {folder.name: folder.digest for folder in self.folders}
        identity = {"config": self.config.identity(), "scale": asdict(self.scale), "concepts": list(photos)}
        # Studies from before the photos were recorded may be of these.
        claim(self.out / "study.json", identity | {"photos": photos}, {"photos": photos})

    def scored(self, setting: Setting, trained_by: Setting) -> ScoredRow:
        """Returns a row of the table, which is computed once; its images are kept beside it.

        `trained_by` is the setting whose concepts are scored: another one, if only the sampling differs.
        """
        folder = self.out / setting.folder

        def make() -> dict:
            concepts, seconds = self.trained(trained_by, self.folders)
            scored = self.scorer.at_strength(setting.strength).score(concepts, self.folders)
            make_folder(folder)
            for name, images in scored.images.items():
                write_atomically(folder / f"{name}.png", strip(images).save)
            row = {"group": setting.group, "name": setting.name, "seconds": seconds, **scored.row}
            return row | {"seconds": None, "numbers": 0} if setting is BASE else row

        return once(folder / "row.json", ScoredRow, make)

    def candidate(self, setting: Setting) -> CandidateRow:
        """Returns how well a setting does on the photos it was trained on, which is computed once."""

        def make() -> dict:
            concepts, seconds = self.trained(setting, self.tried_on)
            fitness = [(x, self.scorer.fitness(concepts, self.tried_on, x)) for x in STRENGTHS]
            row = {"group": setting.group, "name": setting.name, "fitness": fitness, "seconds": seconds}
            return row | {"numbers": size(concepts)}

        return once(self.out / setting.folder / "candidate.json", CandidateRow, make)

    def curve(self, setting: Setting) -> CurveRow:
        """Returns a setting's scores over strengths, which are computed once."""

        def make() -> dict:
            concepts, _ = self.trained(setting, self.folders)
            return {"points": self.scorer.curve(concepts, self.folders)}

        return once(self.out / setting.folder / "curve.json", CurveRow, make)

    def images(self, path: AnyPath) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Reads the images of a `strip`. Raises UserError if the file is damaged."""
        image, side = np.asarray(open_image(path)), self.scorer.pipeline.networks.resolution
        if image.ndim != 3 or image.shape[0] != side or image.shape[1] % side or image.shape[2] != 3:
            raise UserError(f"{path}: an image of {image.shape}; expected images of this study; remove its row.json")
        return np.split(image, image.shape[1] // side, axis=1)


def once(path: AnyPath, kind: type[RowT], make: Callable[[], dict]) -> RowT:
    """Returns the result of `make`, which is called only the first time; the file keeps it.

    Raises UserError if the file does not hold a record of this kind.
    """
    if not path.is_file():
        text = json.dumps(make(), indent=1)
        write_atomically(path, lambda file: file.write_text(text))
    return read_record(path, kind, "expected a row of this study; remove it to compute it again")


def named(folders: Sequence[ConceptFolder], names: tuple[str, ...]) -> tuple[ConceptFolder, ...]:
    """Returns the folders of these names, in their order; all folders if none of them exists."""
    found = {folder.name: folder for folder in folders}
    return tuple(found[name] for name in names if name in found) or tuple(folders)


def strip(images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Image.Image:
    """Joins images of one size in a row."""
    return Image.fromarray(np.concatenate(images, axis=1))
