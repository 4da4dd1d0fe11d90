"""The tables of docs/results.md, each made from a study's rows, with grids of images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.photos import read_photos
from catversion_jax.study import curve, table, together
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


def of_settings(study: Study, settings: Mapping[Setting, Setting], more: Sequence[str] = ()) -> Table:
    """Returns the table with a row for the base model and each setting, and a grid for each concept.

    `settings` are by the setting whose concepts are scored; that of the first one is the base model's too.
    """
    rows = {BASE: next(iter(settings.values())), **settings}
    scored = [study.scored(setting, trained_by) for setting, trained_by in rows.items()]
    grids = {folder.name: settings_grid(study, folder, list(rows)) for folder in study.folders}
    return Table("\n".join([table.of_scores(scored), table.of_accuracies(scored), *more]), grids)


def best_of(tried: Mapping[Setting, CandidateRow]) -> tuple[Setting, float]:
    """Returns the setting and the strength of the highest fitness; one without a value is worse than any."""
    each = [(setting, strength, x) for setting, row in tried.items() for strength, x in row["fitness"]]
    setting, strength, _ = max(each, key=lambda found: -np.inf if found[2] is None else found[2])
    return setting, strength


def baselines(study: Study) -> Table:
    """Returns the table of each method at its best setting and strength, all that were tried, and the curves."""
    tried = {setting: study.candidate(setting) for setting in BASELINES}
    best = {}
    for group in dict.fromkeys(setting.group for setting in tried):
        setting, strength = best_of({s: row for s, row in tried.items() if s.group == group})
        best[replace(setting, name=f"{setting.name}, strength {strength:g}", strength=strength)] = setting
    curves = {setting.group: study.curve(setting) for setting in best.values()}
    chosen = {trained_by: setting.strength for setting, trained_by in best.items()}
    rows = [row | {"chosen": chosen.get(setting)} for setting, row in tried.items()]
    made = of_settings(study, best, [table.of_candidates(rows), table.of_curves(curves)])
    base = study.scored(BASE, next(iter(best.values())))
    return replace(made, grids=made.grids | {"strengths": curve.figure(curves, (base["clip_i"], base["clip_t"]))})


def ablation(study: Study) -> Table:
    # The rows of group "strength" differ from the config in sampling alone.
    return of_settings(study, {setting: CONFIG if setting.group == "strength" else setting for setting in ABLATION})


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
