"""A setting's concepts, judged as `catversion evaluate` does: by held-out photos, masks and unrelated prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from catversion_jax import answers, config, metrics, scores
from catversion_jax.answers import Drawing, Job
from catversion_jax.artifact import Concept
from catversion_jax.concept_folders import described
from catversion_jax.data.photos import read_photos
from catversion_jax.pipeline import Pipeline
from catversion_jax.scores import Judges, Pictures, Values
from catversion_jax.tree import count
from catversion_jax.types import UInt8

SELECTING_SEED = 1000
"""The first seed of the pictures that a rate is chosen by; those of the table begin at 0."""


@dataclass(frozen=True)
class Judged:
    """A row's numbers, and pictures for people: of each concept, the first of each prompt."""

    scores: dict
    pictures: dict[str, list[UInt8[np.ndarray, "h w 3"]]]


def prompts(folder: Path, templates: Sequence[str]) -> tuple[str, ...]:
    concept = described(folder)
    return tuple(config.fill(template, concept["class_word"], concept["article"]) for template in templates)


def judge(
    concepts: dict[str, Concept], folders: Sequence[Path], templates: Sequence[str], drawing: Drawing, judges: Judges
) -> Judged:
    """The scores of all concepts, with intervals over their prompts, and each concept's."""
    units: list[Values] = []
    rows, pictures = [], {}
    for folder in folders:
        concept = concepts[folder.name]
        asked = prompts(folder, templates)
        job = Job(folder.name, asked, folder / "heldout", folder / "heldout_masks", concept, folder, None)
        references = photos(folder, "heldout")
        answer = answers.draw(job, drawing, judges)
        related = scores.of_prompts(answer.prompts, answer.pictures, references, judges)
        rows.append({"concept": folder.name} | scores.concept_row(related, answer.unrelated))
        rows[-1]["copied"] = copied(answer.pictures, photos(folder, "train"), judges)
        units += scores.concept_units(related, answer.unrelated)
        pictures[folder.name] = list(answer.pictures.images[:: len(drawing.seeds)])
    of_row = {"numbers": size(concepts), "copied": float(np.mean([row["copied"] for row in rows])), "concepts": rows}
    return Judged(scores.summarize(units) | of_row, pictures)


def photos(folder: Path, part: str) -> Pictures:
    """A concept's `train` or `heldout` photos, with their masks."""
    return answers.pictures_of(read_photos(folder / part, None, folder / f"{part}_masks"))


def copied(drawn: Pictures, learned_from: Pictures, judges: Judges) -> float:
    """How near the pictures' backgrounds, without the subject, are to those of the photos learned from: the mean
    cosine over all pairs."""
    return float(metrics.clip_i(*(judges.clip.image(x.backgrounds()) for x in (drawn, learned_from))).mean())


def fitness(
    concepts: dict[str, Concept],
    folders: Sequence[Path],
    templates: Sequence[str],
    drawing: Drawing,
    judges: Judges,
    pipeline: Pipeline,
) -> float | None:
    """The overall score against the photos that were learned from, by pictures that no table shows: what a rate is
    chosen by. None where it has no value."""
    drawing = replace(drawing, seeds=tuple(SELECTING_SEED + seed for seed in drawing.seeds))
    values = []
    for folder in folders:
        asked = prompts(folder, templates)
        seen = judges.clip.image(answers.paint(pipeline, asked, drawing, [concepts[folder.name]], folder.name))
        references = judges.clip.image(photos(folder, "train").images)
        captions = np.repeat(judges.clip.text(asked), len(drawing.seeds), axis=0)
        clip_t = metrics.clip_t(seen, captions).mean()
        values.append(metrics.overall(clip_t, metrics.clip_i(seen, references).mean()))
    mean = float(np.mean(values))
    return None if np.isnan(mean) else mean


def size(concepts: dict[str, Concept]) -> int:
    """How many numbers are learned of a concept."""
    return max(count(concept.learned) for concept in concepts.values())
