"""Evaluates concepts: scores with intervals of their images, and the facts to report with them."""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import jax
import numpy as np
from tqdm import tqdm

from catversion_jax import __version__
from catversion_jax.evaluation import masks, page, scores
from catversion_jax.evaluation.encoders import ImageEncoder
from catversion_jax.evaluation.samples import (
    ConceptTask,
    EvaluationConfig,
    ImagesTask,
    Samples,
    base_model,
    find_images,
    find_references,
    sample_task,
)
from catversion_jax.evaluation.scores import Encoders, Values
from catversion_jax.methods.model_names import public_name

UNRELATED = (
    "a photo of a car",
    "a photo of a cat",
    "a photo of a chair",
    "a photo of a bicycle",
    "a photo of a guitar",
    "a photo of a house",
)
"""Default prompts for prior_drift; those that contain the class word are left out."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "tokenizers")


@dataclass
class Evaluation:
    """The results of the tasks evaluated so far."""

    rows: list[dict] = field(default_factory=list)  # one for each concept
    units: list[list[Values]] = field(default_factory=list)  # of each concept
    pictures: dict[str, page.Rows] = field(default_factory=dict)  # to be drawn, by concept

    def add(self, task: ConceptTask | ImagesTask, config: EvaluationConfig, encoders: Encoders) -> None:
        """Scores one more concept."""
        found = find_references(task)
        references = scores.embed(found, encoders)
        samples: Samples
        if isinstance(task, ConceptTask):
            samples = sample_task(base_model(task, config), task, config, encoders)
        else:
            samples = find_images(task)
        related = scores.of_embedded(samples.prompts, scores.embed(samples.images, encoders), references, encoders)
        counts = {"concept": task.name, "references": len(found), "pictures": len(samples.prompts)}
        row = counts | {"attention_mask_iou": samples.attention_mask_iou}
        self.rows.append(row | scores.concept_row(related, samples.unrelated))
        self.units.append(scores.concept_units(related, samples.unrelated))
        self.pictures[task.name] = page.thumbnail_rows(found, samples.prompts, samples.images)

    def result(self) -> dict:
        """Returns the scores over all concepts, with those of each concept."""
        overlaps = [row["attention_mask_iou"] for row in self.rows if row["attention_mask_iou"] is not None]
        # With several concepts, the intervals resample the concepts; with one, its own units.
        several = len(self.units) > 1
        units = [scores.merged(unit) for unit in self.units] if several else self.units[0]
        return scores.summarize(units) | {
            "attention_mask_iou": float(np.mean(overlaps)) if overlaps else None,
            "concepts": self.rows,
            "definitions": scores.DEFINITIONS,
        }


def evaluate(tasks: Sequence[ConceptTask | ImagesTask], config: EvaluationConfig, encoders: Encoders) -> Evaluation:
    """Scores the concept of each task."""
    evaluation = Evaluation()
    for task in tqdm(tasks, unit=" concepts", disable=len(tasks) == 1):
        evaluation.add(task, config, encoders)
    return evaluation


def described_encoder(encoder: ImageEncoder) -> dict:
    """Returns what has to be reported with every score of an encoder, without where it is on this machine."""
    described = encoder.described()
    return described | {"name": public_name(described["name"])}


def describe(
    tasks: Sequence[ConceptTask | ImagesTask], config: EvaluationConfig, encoders: Encoders, rows: Sequence[dict]
) -> dict:
    """Returns what has to be reported with the scores: the encoders, and how images were sampled and masked."""
    # Each concept's strength is the one that acted, whether it is its own or that of the config.
    acting = {task.name: config.acting(task.concept)[0] for task in tasks if isinstance(task, ConceptTask)}
    concepts = {name: concept.metadata() for name, concept in acting.items()}
    measured = any(row["masked_clip_i"] is not None for row in rows)
    by_attention = "attention, GrabCut" if config.grabcut else "attention"
    return {
        "clip": described_encoder(encoders.clip.image),
        "dino": encoders.dino and described_encoder(encoders.dino),
        "background": {
            "fill_rgb": masks.FILL,
            "masks_of_references": "files" if measured else None,
            "masks_of_pictures": (by_attention if concepts else "files") if measured else None,
            "attention": {"timesteps": masks.TIMESTEPS, "threshold": "Otsu"} if measured and concepts else None,
        },
        "drawing": asdict(config) | {"model": public_name(config.model)} if concepts else None,
        "concepts": concepts,
    }


def versions() -> dict[str, str]:
    """Returns the versions that the scores were computed with."""
    ours = {"catversion-jax": __version__, "python": platform.python_version(), "backend": jax.default_backend()}
    return ours | {package: importlib.metadata.version(package) for package in PACKAGES}
