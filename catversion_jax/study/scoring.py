"""Scores a setting's concepts like `catversion evaluate`: with held-out photos, masks and unrelated prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.photos import read_photos
from catversion_jax.evaluation import metrics, scores
from catversion_jax.evaluation.image_sets import MaskedImages, masked_images
from catversion_jax.evaluation.samples import ConceptTask, EvaluationConfig, sample, sample_task
from catversion_jax.evaluation.scores import Encoders, Values
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.study import accuracy
from catversion_jax.study.accuracy import World
from catversion_jax.study.settings import CURVE
from catversion_jax.utils.tree import count_numbers
from catversion_jax.utils.types import Float, UInt8

SELECTING_SEED = 1000
"""First seed of the images by which a setting is chosen; the seeds of the table's images begin at 0."""


@dataclass(frozen=True)
class Scored:
    """A row's scores and, for each concept, the first image of each prompt."""

    row: dict
    images: dict[str, list[UInt8[np.ndarray, "h w 3"]]]


@dataclass(frozen=True, eq=False)
class Scorer:
    """How the concepts of every row are sampled and scored."""

    pipeline: BasePipeline
    encoders: Encoders
    config: EvaluationConfig
    templates: tuple[str, ...]
    world: World | None  # what the model knows, for the accuracies; None: they are not measured

    def at_strength(self, strength: float | None) -> "Scorer":
        return replace(self, config=replace(self.config, strength=strength))

    def curve(
        self, concepts: Mapping[str, Concept], folders: Sequence[ConceptFolder]
    ) -> list[tuple[float, float, float]]:
        """Returns CLIP-I and CLIP-T of the first image of each prompt, as means over all concepts, by strength."""
        points = []
        for strength in CURVE:
            config = replace(self.config, strength=strength, seeds=self.config.seeds[:1])
            scored = [self.alignment(concepts[folder.name], folder, config, heldout(folder)) for folder in folders]
            clip_i, clip_t = np.mean(scored, axis=0)
            points.append((strength, float(clip_i), float(clip_t)))
        return points

    def alignment(
        self, concept: Concept, folder: ConceptFolder, config: EvaluationConfig, references: MaskedImages
    ) -> tuple[float, float]:
        """Returns the mean CLIP-I and CLIP-T of a concept's images."""
        prompts, clip = folder.prompts(self.templates), self.encoders.clip
        seen = clip.image(sample(self.pipeline, prompts, config, config.acting(concept), folder.name))
        captions = np.repeat(clip.text(prompts), len(config.seeds), axis=0)
        clip_i = metrics.clip_i(seen, clip.image(references.images)).mean()
        return float(clip_i), float(metrics.clip_t(seen, captions).mean())

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
            embeddings = self.encoders.clip.image(samples.images.images)
            for prompt, hits in self.hits(folder, embeddings).items():
                related[prompt] |= hits
            rows.append({"concept": folder.name} | scores.concept_row(related, samples.unrelated))
            rows[-1]["copied"] = copied(samples.images, photos_trained_on(folder), self.encoders)
            units += scores.concept_units(related, samples.unrelated)
            images[folder.name] = list(samples.images.images[:: len(self.config.seeds)])
        whole = scores.summarize(units, (*scores.SCORES, *accuracy.NAMES))
        whole["accuracy"] = {name: whole.pop(name) for name in accuracy.NAMES}
        mean_copied = float(np.mean([row["copied"] for row in rows]))
        return Scored(whole | {"numbers": size(concepts), "copied": mean_copied, "concepts": rows}, images)

    @cached_property
    def embed_captions(self) -> accuracy.Embed:
        """Embeds captions, each tuple of them once: the classes' are those of every prompt."""
        return cache(lambda captions: self.encoders.clip.text(list(captions)))

    def hits(self, folder: ConceptFolder, embeddings: Float[np.ndarray, "G e"]) -> dict[str, Values]:
        """Returns, for each prompt, which of its images have each accuracy; the images are ordered by prompt."""
        if self.world is None:
            return {}
        of_prompts = np.split(embeddings, len(self.templates))
        return {
            prompt: accuracy.hits(self.world, self.embed_captions, folder, template, x)
            for prompt, template, x in zip(folder.prompts(self.templates), self.templates, of_prompts, strict=True)
        }

    def fitness(
        self, concepts: Mapping[str, Concept], folders: Sequence[ConceptFolder], strength: float
    ) -> float | None:
        """Returns the overall score against the photos that were trained on, by which a setting is chosen.

        Its images are in no table. None if the score is NaN.
        """
        seeds = tuple(SELECTING_SEED + seed for seed in self.config.seeds)
        config = replace(self.config, seeds=seeds, strength=strength)
        each = [self.alignment(concepts[f.name], f, config, photos_trained_on(f)) for f in folders]
        mean = float(np.mean([metrics.overall(clip_t, clip_i) for clip_i, clip_t in each]))
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
