"""Collects the images to evaluate: sampled from a concept or read from disk, with subject masks if available."""

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import BasePipeline, load_pipeline
from catversion_jax.base.prompt_tokens import prompts_without
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.data.photos import FolderRules, PhotoFile, find_photos
from catversion_jax.data.prompts import article, fill
from catversion_jax.evaluation import masks, scores
from catversion_jax.evaluation.grabcut import grabcut
from catversion_jax.evaluation.image_sets import MaskedImages, StoredImages
from catversion_jax.evaluation.scores import Encoders, Values
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.concept_model import load_for_concepts, model_of
from catversion_jax.sampling.conditioning import context
from catversion_jax.sampling.image_names import GRID, NAMED, unique_slugs
from catversion_jax.sampling.sampler import SampleRequest, sample_images
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn
from catversion_jax.utils.padded_batches import groups
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.types import Bool, UInt8

MAX_IMAGES = 10_000

SetT = TypeVar("SetT", MaskedImages, StoredImages)


@dataclass(frozen=True)
class EvaluationTask:
    """One concept to evaluate."""

    name: str
    prompts: tuple[str, ...]
    references: AnyPath
    masks: AnyPath | None  # of the references; None: the references' own masks folder, if it exists
    source: AnyPath  # of the concept, or the folder of images


@dataclass(frozen=True)
class ConceptTask(EvaluationTask):
    """A concept whose images are sampled."""

    concept: Concept


@dataclass(frozen=True)
class ImagesTask(EvaluationTask):
    """A concept whose images exist already."""

    image_masks: AnyPath | None = None


@dataclass(frozen=True)
class Samples(Generic[SetT]):
    """A task's images, one for each of `prompts`, and what was measured while sampling them."""

    prompts: list[str]
    images: SetT
    unrelated: dict[str, Values] = field(default_factory=dict)
    attention_mask_iou: float | None = None  # of attention masks and given masks, on the references


@dataclass(frozen=True)
class EvaluationConfig:
    """How images of a concept are sampled for an evaluation."""

    sampler: SamplerConfig
    seeds: tuple[int, ...]  # one image of each prompt for each seed
    strength: float | None  # None: each concept's own
    unrelated: tuple[str, ...]  # prompts for prior_drift
    model: str  # "": the one the concept was trained on
    dtype: str
    grabcut: bool = False  # refine the attention masks along edges

    def acting(self, *concepts: Concept) -> tuple[Concept, ...]:
        """The concepts at the strength to evaluate them at."""
        return tuple(concept.at(self.strength) for concept in concepts)


def find_references(task: EvaluationTask) -> StoredImages:
    """Returns a task's reference photos with their masks."""
    return StoredImages(
        find_photos(task.references, task.masks or "", FolderRules(("references", "masks"), MAX_IMAGES))
    )


def is_no_grid(path: AnyPath) -> bool:
    return not GRID.fullmatch(path.name)


def find_images(task: ImagesTask) -> Samples[StoredImages]:
    """Finds existing images: all of a folder for one prompt; for several, by the names `catversion generate` gives."""
    rules = FolderRules(("images", "image_masks"), MAX_IMAGES, is_no_grid)
    photos = find_photos(task.source, task.image_masks or "", rules)
    if len(task.prompts) == 1:
        return Samples([*task.prompts] * len(photos), StoredImages(photos))
    slugs = (unicodedata.normalize("NFC", slug) for slug in unique_slugs(task.prompts))  # as the photos' names
    by_slug = dict(zip(slugs, task.prompts, strict=True))
    named = "of several prompts, images are named <prompt-slug>_<key>_<seed>.png, as catversion generate does"
    by_prompt: dict[str, list[PhotoFile]] = {prompt: [] for prompt in task.prompts}
    keys: dict[str, set[str | None]] = {}
    for photo in photos:
        match = NAMED.fullmatch(photo.name)
        prompt = by_slug.get(match["slug"]) if match else None
        if match is None or prompt is None:
            raise UserError(f"{photo.path}: of none of the prompts; {named}")
        by_prompt[prompt].append(photo)
        keys.setdefault(prompt, set()).add(match["key"])
    if mixed := [prompt for prompt, found in keys.items() if len(found) > 1]:
        warn(f"{task.source}: images of several concepts or settings for {mixed[0]!r}, by their names; all count")
    if missing := [prompt for prompt, found in by_prompt.items() if not found]:
        raise UserError(f"{task.source}: no image of {len(missing)} prompts, such as {missing[0]!r}; {named}")
    prompts = [prompt for prompt, found in by_prompt.items() for _ in found]
    return Samples(prompts, StoredImages([photo for found in by_prompt.values() for photo in found]))


load_once = functools.cache(load_pipeline)
"""`load_pipeline`, but concepts of one base model share it."""


def base_model(task: ConceptTask, config: EvaluationConfig) -> BasePipeline:
    """Loads the model to sample from. Raises UserError if the concept was not learned in it."""
    concepts = {str(task.source): task.concept}
    pipeline, warnings = load_for_concepts(concepts, model_of(concepts, config.model, config.dtype), load_once)
    for warning in warnings:
        warn(warning)
    return pipeline


def check_class_word(pipeline: BasePipeline, task: ConceptTask) -> None:
    """Raises UserError if a prompt lacks the class word."""
    word = task.concept.class_word
    (without,) = prompts_without(pipeline.tokenizers, [word], task.prompts)
    if word and without:
        raise UserError(
            f"prompt {without[0]!r}: no class word {word!r}, which the concept was learned with; "
            "write it into the prompt"
        )


def sample(
    pipeline: BasePipeline,
    prompts: Sequence[str],
    config: EvaluationConfig,
    concepts: Sequence[Concept] = (),
    name: str = "",
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Samples an image of each prompt with each of the config's seeds; `name` labels the progress bar."""
    request = SampleRequest.every(prompts, config.seeds, config.sampler)
    images = sample_images(pipeline, request, concepts)
    return list(tqdm(images, total=len(request.prompts), unit=" images", desc=name, leave=False))


@functools.cache
def sample_base(
    pipeline: BasePipeline, prompts: tuple[str, ...], config: EvaluationConfig
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Samples the base model's images, which are cached since all concepts share them."""
    return sample(pipeline, prompts, config)


def sample_task(
    pipeline: BasePipeline, task: ConceptTask, config: EvaluationConfig, encoders: Encoders
) -> Samples[MaskedImages]:
    """Samples images of the concept, finds masks if the references have masks, and measures the prior drift."""
    concept = task.concept
    check_class_word(pipeline, task)
    references = find_references(task)
    masked = references.has_masks and bool(concept.class_word)
    if config.grabcut and not masked:
        raise UserError("grabcut: nothing to mask without masks of the references and a class word")

    def find_masks(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Bool[np.ndarray, "H W"]]:
        rough = masks.attention_masks(pipeline, np.stack(images), prompts, concept.class_word)
        return list(map(grabcut, images, rough)) if config.grabcut else list(rough)

    # Before the sampling, which may take hours: a reference that cannot be read is found here.
    overlaps = []
    for group in groups(references.files if masked else ()):
        photos = [file.read(pipeline.networks.resolution) for file in group]
        found = find_masks([photo.image for photo in photos], [plain_prompt(concept)] * len(photos))
        overlaps += [masks.iou(a, photo.mask) for a, photo in zip(found, photos, strict=True) if photo.mask is not None]
    prompts = [prompt for prompt in task.prompts for _ in config.seeds]
    images = sample(pipeline, task.prompts, config, config.acting(concept), task.name)
    unrelated = measure_drift(pipeline, concept, config, encoders)
    if not masked:
        return Samples(prompts, MaskedImages(images, None), unrelated)
    of_images: list[Bool[np.ndarray, "H W"]] = []
    for pairs in groups(zip(images, prompts, strict=True)):
        of_images += find_masks([image for image, _ in pairs], [prompt for _, prompt in pairs])
    return Samples(prompts, MaskedImages(images, of_images), unrelated, float(np.mean(overlaps)))


def measure_drift(
    pipeline: BasePipeline, concept: Concept, config: EvaluationConfig, encoders: Encoders
) -> dict[str, Values]:
    """Returns the drift of each unrelated prompt that does not contain the class word."""
    prompts = tuple(prompts_without(pipeline.tokenizers, [concept.class_word], config.unrelated)[0])
    if not prompts:
        return {}
    (acting,) = config.acting(concept)
    base = sample_base(pipeline, prompts, replace(config, strength=None))  # one for all strengths
    images = (base, sample(pipeline, prompts, config, [acting]))
    of_prompts = (np.split(np.stack(side), len(prompts)) for side in images)
    states = ((context(pipeline, [p]).states, context(pipeline, [p], acting).states) for p in prompts)
    return {
        prompt: scores.of_unrelated(base, moved, of_prompt, encoders)
        for prompt, base, moved, of_prompt in zip(prompts, *of_prompts, states, strict=True)
    }


def plain_prompt(concept: Concept) -> str:
    """Returns the prompt for the references: the concept's first training prompt with the class word."""
    templates = (*concept.templates, "a photo of {concept}")
    template = next(template for template in templates if "{concept}" in template or "{class_word}" in template)
    return fill(template, concept.class_word, article(concept.class_word))
