"""The tables of docs/results.md, each made from a study's rows, with grids of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.photos import read_photos
from catversion_jax.study import table, together
from catversion_jax.study.rows import CandidateRow, GroupRows
from catversion_jax.study.settings import (
    ABLATION,
    BASE,
    BASELINES,
    CONFIG,
    FULL,
    FULL_ABLATION,
    QUICK,
    QUICK_TOGETHER,
    TOGETHER,
    Scale,
    Setting,
)
from catversion_jax.study.study import Study, once, strip
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.image_grid import grid


@dataclass(frozen=True)
class Table:
    text: str
    grids: dict[str, Image.Image]  # by file name


def of_settings(study: Study, settings: Sequence[Setting], more: str = "") -> Table:
    """Returns the table with a row for the base model and each setting, and a grid for each concept."""
    rows = [study.scored(BASE, settings[0]), *(study.scored(setting, setting) for setting in settings)]
    grids = {folder.name: settings_grid(study, folder, [BASE, *settings]) for folder in study.folders}
    return Table("\n".join(filter(None, [table.of_scores(rows), more])), grids)


def fitness(row: CandidateRow) -> float:
    return -np.inf if row["fitness"] is None else row["fitness"]


def baselines(study: Study) -> Table:
    """Returns the table of each method at its best learning rate, followed by all rates tried."""
    tried = {setting: study.candidate(setting) for setting in BASELINES}
    best: dict[str, Setting] = {}
    for setting, row in tried.items():
        if setting.group not in best or fitness(row) > fitness(tried[best[setting.group]]):
            best[setting.group] = setting
    rows = [row | {"chosen": setting in best.values()} for setting, row in tried.items()]
    return of_settings(study, list(best.values()), table.of_candidates(rows))


def ablation(study: Study) -> Table:
    return of_settings(study, ABLATION)


def together_table(study: Study) -> Table:
    """Returns the table of all pairs and triples of concepts in one prompt."""
    concepts, _ = study.trained(CONFIG, study.folders)
    groups = [*combinations(study.folders, 2), *combinations(study.folders, 3)]
    found, grids = {}, {}
    for folders in groups:
        name = "-and-".join(folder.name for folder in folders)

        def make(folders=folders, name=name) -> dict:
            own = [concepts[folder.name] for folder in folders]
            group = together.score_group(study.scorer, folders, own)
            for variant, images in group.images.items():
                write_atomically(study.out / f"{name}-{variant}.png", strip(images).save)
            return {"rows": group.rows, "all": group.all_shown, "variants": list(group.images)}

        found[name] = once(study.out / f"{name}.json", GroupRows, make)
        variants = found[name]["variants"]
        rows = [study.images(study.out / f"{name}-{variant}.png") for variant in variants]
        grids[name] = grid(rows, variants, together.prompts(folders, study.scorer.templates))
    return Table(table.of_groups(found), grids)


class Kind(NamedTuple):
    """A kind of table: how it is made, and the size of its full and its quick form."""

    make: Callable[[Study], Table]
    full: Scale
    quick: Scale


TABLES = {
    "rivals": Kind(baselines, FULL, QUICK),
    "ablation": Kind(ablation, FULL_ABLATION, QUICK),
    "together": Kind(together_table, TOGETHER, QUICK_TOGETHER),
}


def settings_grid(study: Study, folder: ConceptFolder, settings: Sequence[Setting]) -> Image.Image:
    """Returns a grid of the held-out photos and a row for each setting, with its first image of each prompt."""
    rows = [study.images(study.out / setting.folder / f"{folder.name}.png") for setting in settings]
    photos = read_photos(folder.heldout, study.scorer.pipeline.networks.resolution, folder.heldout_masks)
    labels = ["held out", *(setting.title for setting in settings)]
    held_out = [photo.image for photo in photos[: len(rows[0])]]
    return grid([held_out, *rows], labels, folder.prompts(study.scorer.templates), captions_above=1)
