"""`catversion study rivals`, `ablation` and `together`: the tables of docs/results.md, from training to the numbers.

What is learned and judged stays in --out, a row at a time: the same command goes on where it was interrupted.
"""

import datetime
import json
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from catversion_jax import concept_folders, encoders
from catversion_jax import config as config_lib
from catversion_jax.answers import Drawing
from catversion_jax.artifact import Concept
from catversion_jax.claim import claim
from catversion_jax.data.photos import read_photos
from catversion_jax.errors import UserError
from catversion_jax.evaluate import UNRELATED, versions
from catversion_jax.files import write_atomically
from catversion_jax.grid import grid
from catversion_jax.pipeline import Pipeline
from catversion_jax.run_dir import plain
from catversion_jax.scores import Judges
from catversion_jax.study import scoring, table, together
from catversion_jax.study.learning import SLOTS, learn
from catversion_jax.study.settings import (
    ABLATION,
    CONFIG,
    FULL,
    FULL_ABLATION,
    QUICK,
    QUICK_TOGETHER,
    RIVALS,
    TOGETHER,
    TRIED_ON,
    Scale,
    Setting,
)
from catversion_jax.train import given_config, load_model

POSITIONALS = ("TABLE",)
CONFIGS = Path(__file__).parents[2] / "configs"
BASE = Setting("base model", "", {})


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", str(CONFIGS / "mini.py"), "What every setting starts from.")
    flags.DEFINE_string(
        "concepts", str(concept_folders.SHIPPED), "A folder of concepts with train/, heldout/ and their masks."
    )
    flags.DEFINE_string("out", "runs/study", "Where everything is kept; what is there is not done again.")
    flags.DEFINE_bool("quick", False, "A small part of it: fewer concepts, steps and prompts.")


@dataclass(frozen=True)
class Study:
    """What all settings of a table share."""

    config: ConfigDict
    folders: tuple[Path, ...]
    scale: Scale
    out: Path
    pipeline: Pipeline
    judges: Judges
    drawing: Drawing

    def config_of(self, setting: Setting) -> ConfigDict:
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(setting.changes)
        config.train.steps = self.scale.steps or config.train.steps
        config.sample.every, config.checkpoint.every, config.checkpoint.keep = 0, config.train.steps, 1
        return config

    @property
    def templates(self) -> tuple[str, ...]:
        return tuple(self.config.sample.prompts[: self.scale.prompts])

    def place(self, setting: Setting) -> Path:
        return self.out / "-".join(re.sub(r"[^\w.]+", "-", part) for part in (setting.group, setting.name))

    @property
    def tried_on(self) -> tuple[Path, ...]:
        """The concepts that a rate is chosen by."""
        return named(self.folders, TRIED_ON)

    def learned(self, setting: Setting, folders: tuple[Path, ...]) -> tuple[dict[str, Concept], float | None]:
        return learn(self.config_of(setting), folders, self.place(setting), self.pipeline)

    def claim(self) -> None:
        """Make the folder this study's. Raises UserError where it is another's."""
        what = {"config": plain(self.config), "scale": asdict(self.scale), "concepts": [f.name for f in self.folders]}
        claim(self.out / "study.json", what)

    def judged(self, setting: Setting, learned_by: Setting) -> dict:
        """A row of the table, with the pictures beside it; once."""
        place = self.place(setting)

        def make() -> dict:
            concepts, seconds = self.learned(learned_by, self.folders)
            drawing = replace(self.drawing, strength=0.0) if setting is BASE else self.drawing
            judged = scoring.judge(concepts, self.folders, self.templates, drawing, self.judges)
            place.mkdir(parents=True, exist_ok=True)
            for name, pictures in judged.pictures.items():
                write_atomically(place / f"{name}.png", strip(pictures).save)
            row = {"group": setting.group, "name": setting.name, "seconds": seconds, **judged.scores}
            return row | {"seconds": None, "numbers": 0} if setting is BASE else row

        return once(place / "row.json", make)

    def candidate(self, setting: Setting) -> dict:
        """How well a setting does on the photos it learned from; once."""

        def make() -> dict:
            concepts, seconds = self.learned(setting, self.tried_on)
            fitness = scoring.fitness(concepts, self.tried_on, self.templates, self.drawing, self.judges, self.pipeline)
            row = {"group": setting.group, "name": setting.name, "fitness": fitness, "seconds": seconds}
            return row | {"numbers": scoring.size(concepts)}

        return once(self.place(setting) / "candidate.json", make)


def once(path: Path, make: Callable[[], dict]) -> dict:
    """What `make` gave the first time, which the file keeps."""
    if not path.is_file():
        text = json.dumps(make(), indent=1)
        write_atomically(path, lambda file: file.write_text(text))
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Table:
    text: str
    grids: dict[str, Image.Image]  # by file name


def of_settings(study: Study, settings: Sequence[Setting], more: str = "") -> Table:
    """A row for the base model and each setting, and a grid for each concept."""
    rows = [study.judged(BASE, settings[0]), *(study.judged(setting, setting) for setting in settings)]
    grids = {folder.name: picture_grid(study, folder, [BASE, *settings]) for folder in study.folders}
    return Table("\n".join(filter(None, [table.of_scores(rows), more])), grids)


def fitness(row: dict) -> float:
    return -np.inf if row["fitness"] is None else row["fitness"]


def rivals(study: Study) -> Table:
    """Each method at the best of its rates, and all of them."""
    tried = {setting: study.candidate(setting) for setting in RIVALS}
    best: dict[str, Setting] = {}
    for setting, row in tried.items():
        if setting.group not in best or fitness(row) > fitness(tried[best[setting.group]]):
            best[setting.group] = setting
    rows = [row | {"chosen": setting in best.values()} for setting, row in tried.items()]
    return of_settings(study, list(best.values()), table.of_candidates(rows))


def ablation(study: Study) -> Table:
    return of_settings(study, ABLATION)


def several(study: Study) -> Table:
    """Every two, and every three, concepts in one prompt."""
    concepts, _ = study.learned(CONFIG, study.folders)
    groups = [*combinations(study.folders, 2), *combinations(study.folders, 3)]
    found, grids = {}, {}
    for folders in groups:
        name = "-and-".join(folder.name for folder in folders)

        def make(folders=folders, name=name) -> dict:
            own = [concepts[folder.name] for folder in folders]
            group = together.judge(folders, own, study.templates, study.drawing, study.pipeline, study.judges)
            for variant, pictures in group.pictures.items():
                write_atomically(study.out / f"{name}-{variant}.png", strip(pictures).save)
            return {"rows": group.rows, "all": group.all_shown, "variants": list(group.pictures)}

        found[name] = once(study.out / f"{name}.json", make)
        variants = found[name]["variants"]
        rows = [unstrip(study, study.out / f"{name}-{variant}.png") for variant in variants]
        grids[name] = grid(rows, variants, together.prompts(folders, study.templates))
    return Table(table.of_groups(found), grids)


class Kind(NamedTuple):
    """A table: how it is made, how large it is, and how large with --quick."""

    make: Callable[[Study], Table]
    full: Scale
    quick: Scale


TABLES = {
    "rivals": Kind(rivals, FULL, QUICK),
    "ablation": Kind(ablation, FULL_ABLATION, QUICK),
    "together": Kind(several, TOGETHER, QUICK_TOGETHER),
}


def main(arguments: flags.FlagValues, name: str) -> int:
    """Write table.md and grids of pictures."""
    if name not in TABLES:
        raise UserError(f"{name}: no such table; expected one of {', '.join(TABLES)}")
    start = time.monotonic()
    study = open_study(arguments, name)
    study.claim()
    made = TABLES[name].make(study)
    text = f"{header(name, study, (time.monotonic() - start) / 60)}\n{made.text}"
    write_atomically(study.out / "table.md", lambda path: path.write_text(text))
    for name, image in made.grids.items():
        write_atomically(study.out / f"{name}.png", image.save)
    print(f"{text}\n{study.out / 'table.md'}; pictures: {', '.join(str(study.out / f'{n}.png') for n in made.grids)}")
    return 0


def open_study(arguments: flags.FlagValues, name: str) -> Study:
    config = given_config(arguments)
    scale = TABLES[name].quick if arguments.quick else TABLES[name].full
    folders = named(concept_folders.find(arguments.concepts), scale.concepts)
    pipeline = load_model(config, SLOTS)
    judges = Judges(encoders.of_model(config_lib.model_path(config)), None)
    sampler = config_lib.sampler_config(config)
    drawing = Drawing(sampler, tuple(range(scale.seeds)), 1.0, UNRELATED[: scale.unrelated], "", config.model.dtype)
    out = config_lib.expand(arguments.out) / (f"{name}-quick" if arguments.quick else name)
    return Study(config, folders, scale, out, pipeline, judges, drawing)


def named(folders: Sequence[Path], names: tuple[str, ...]) -> tuple[Path, ...]:
    """The folders of these names, in their order; all where there is none of them."""
    found = {folder.name: folder for folder in folders}
    return tuple(found[name] for name in names if name in found) or tuple(folders)


def header(name: str, study: Study, minutes: float) -> str:
    """What has to be said with the numbers."""
    steps = study.scale.steps or study.config.train.steps
    sampler, (device, *_) = study.drawing.sampler, jax.devices()
    lines = (
        f"`catversion study {name}`, {datetime.date.today()}, on {device.device_kind};",
        f"{minutes:.0f} minutes in its last run.",
        f"Concepts: {', '.join(folder.name for folder in study.folders)};",
        f"{steps} steps of {study.config.train.batch_size}, seed {study.config.seed}.",
        f"Pictures: {len(study.templates)} prompts x seeds 0 to {study.scale.seeds - 1},",
        f"{sampler.steps} steps, guidance {sampler.guidance};",
        f"unrelated: {', '.join(study.drawing.unrelated) or 'none'}.",
        "In brackets, 95 % bootstrap intervals over the prompts of all concepts.",
        ", ".join(f"{package} {version}" for package, version in versions().items()),
    )
    return textwrap.fill(" ".join(lines), 120) + "\n"


def strip(pictures: Sequence[np.ndarray]) -> Image.Image:
    return Image.fromarray(np.concatenate(pictures, axis=1))


def unstrip(study: Study, path: Path) -> list[np.ndarray]:
    """The pictures of a `strip`."""
    image = np.asarray(Image.open(path))
    return np.split(image, image.shape[1] // study.pipeline.networks.resolution, axis=1)


def picture_grid(study: Study, folder: Path, settings: Sequence[Setting]) -> Image.Image:
    """Held-out photos, then a row for each setting: its first picture of each prompt."""
    rows = [unstrip(study, study.place(setting) / f"{folder.name}.png") for setting in settings]
    photos = read_photos(folder / "heldout", study.pipeline.networks.resolution, folder / "heldout_masks")
    labels = ["held out", *(f"{setting.group} {setting.name}".replace("_", " ") for setting in settings)]
    held_out = [photo.image for photo in photos[: len(rows[0])]]
    return grid([held_out, *rows], labels, scoring.prompts(folder, study.templates), captions_above=1)
