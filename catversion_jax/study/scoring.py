"""Scores a setting's concepts like `catversion evaluate`: with held-out photos, masks and unrelated prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.photos import read_photos
from catversion_jax.evaluation import metrics, scores
from catversion_jax.evaluation.image_sets import MaskedImages, masked_images
from catversion_jax.evaluation.samples import ConceptTask, EvaluationConfig, sample, sample_task
from catversion_jax.evaluation.scores import Encoders, Values
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.tree import count_numbers
from catversion_jax.utils.types import UInt8

SELECTING_SEED = 1000
"""First seed of the images by which a learning rate is chosen; the seeds of the table's images begin at 0."""


@dataclass(frozen=True)
class Scored:
    """A row's scores and, for each concept, the first image of each prompt."""

    row: dict
    images: dict[str, list[UInt8[np.ndarray, "h w 3"]]]


@dataclass(frozen=True, eq=False)
class Scorer:
    """How the concepts of every row are sampled and scored."""

    pipeline: Pipeline
    encoders: Encoders
    config: EvaluationConfig
    templates: tuple[str, ...]

    def at_strength(self, strength: float) -> "Scorer":
        return replace(self, config=replace(self.config, strength=strength))

    def score(self, concepts: Mapping[str, Concept], folders: Sequence[ConceptFolder]) -> Scored:
        """Returns the scores over all concepts, with intervals over their prompts, and those of each concept."""
        units: list[Values] = []
        rows, images = [], {}
        for folder in folders:
            prompts, concept = folder.prompts(self.templates), concepts[folder.name]
            # Concepts of an interrupted study may be of a model that has been replaced since.
            pipeline, model = self.pipeline, "the study's model"
            concept_file.check_model(concept, pipeline.fingerprint, pipeline.networks, str(folder.path), model)
            task = ConceptTask(folder.name, prompts, folder.heldout, folder.heldout_masks, folder.path, concept)
            samples = sample_task(pipeline, task, self.config, self.encoders)
            related = scores.of_prompts(samples.prompts, samples.images, heldout(folder), self.encoders)
            rows.append({"concept": folder.name} | scores.concept_row(related, samples.unrelated))
            rows[-1]["copied"] = copied(samples.images, photos_trained_on(folder), self.encoders)
            units += scores.concept_units(related, samples.unrelated)
            images[folder.name] = list(samples.images.images[:: len(self.config.seeds)])
        mean_copied = float(np.mean([row["copied"] for row in rows]))
        return Scored(
            scores.summarize(units) | {"numbers": size(concepts), "copied": mean_copied, "concepts": rows}, images
        )

    def fitness(self, concepts: Mapping[str, Concept], folders: Sequence[ConceptFolder]) -> float | None:
        """Returns the overall score against the photos that were trained on, by which a learning rate is chosen.

        Its images are in no table. None if the score is NaN.
        """
        config = replace(self.config, seeds=tuple(SELECTING_SEED + seed for seed in self.config.seeds))
        values = []
        for folder in folders:
            prompts, personalization = folder.prompts(self.templates), config.personalization(concepts[folder.name])
            seen = self.encoders.clip.image(sample(self.pipeline, prompts, config, personalization, folder.name))
            references = self.encoders.clip.image(photos_trained_on(folder).images)
            captions = np.repeat(self.encoders.clip.text(prompts), len(config.seeds), axis=0)
            clip_t = metrics.clip_t(seen, captions).mean()
            values.append(float(metrics.overall(clip_t, metrics.clip_i(seen, references).mean())))
        mean = float(np.mean(values))
        return None if np.isnan(mean) else mean


def heldout(folder: ConceptFolder) -> MaskedImages:
    return masked_images(read_photos(folder.heldout, None, folder.heldout_masks))


def photos_trained_on(folder: ConceptFolder) -> MaskedImages:
    return masked_images(read_photos(folder.train, None, folder.train_masks))


def copied(sampled: MaskedImages, trained_on: MaskedImages, encoders: Encoders) -> float:
    """Returns the mean cosine over all pairs of a sampled image's and a training photo's background."""
    return float(metrics.clip_i(*(encoders.clip.image(x.backgrounds()) for x in (sampled, trained_on))).mean())


def size(concepts: Mapping[str, Concept]) -> int:
    """Returns how many parameters are learned for a concept."""
    return max(count_numbers(concept.learned) for concept in concepts.values())
