"""What a concept's pictures are: drawn with it, or read from a folder; with the masks that can be had of them."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from catversion_jax import config, masks, sampling, scores
from catversion_jax.artifact import Concept
from catversion_jax.conditioning import context
from catversion_jax.data.photos import Photo, is_candidate, read_photos
from catversion_jax.errors import UserError
from catversion_jax.generate import open_model, unique_slugs
from catversion_jax.grabcut import grabcut
from catversion_jax.pipeline import Pipeline, load
from catversion_jax.sampling import SamplerConfig
from catversion_jax.scores import Judges, Pictures, Values
from catversion_jax.text import without_word
from catversion_jax.types import Bool, UInt8

MAX_PICTURES = 10_000
GRID = re.compile(r"grid(_\d+)?\.png")  # what `catversion generate` leaves beside its pictures
DRAWN = re.compile(r"(.+)_\d+")  # and what it calls them


@dataclass(frozen=True)
class Job:
    """One concept to evaluate: `concept`, or pictures of it in `images`."""

    name: str
    prompts: tuple[str, ...]
    references: Path
    masks: Path | None
    concept: Concept | None
    source: Path  # of the concept, or the folder of pictures
    image_masks: Path | None


@dataclass(frozen=True)
class Answers:
    """A job's pictures, one for each of `prompts`, and what drawing them told besides."""

    prompts: list[str]
    pictures: Pictures
    unrelated: dict[str, Values] = field(default_factory=dict)
    attention_mask_iou: float | None = None  # of the attention masks and the given ones, of the references


@dataclass(frozen=True)
class Drawing:
    """How pictures of a concept are drawn."""

    sampler: SamplerConfig
    seeds: tuple[int, ...]  # a picture of each prompt with each
    strength: float
    unrelated: tuple[str, ...]  # prompts to see by how far the base model moved
    model: str  # "": the one the concept was learned on
    dtype: str
    grabcut: bool = False  # draw the masks from attention again along edges


def read_references(job: Job, resolution: int | None = None) -> list[Photo]:
    """As they are or, with a resolution, as squares."""
    return read_photos(job.references, resolution, job.masks or "", ("--references", "--masks"), MAX_PICTURES)


def pictures_of(photos: Sequence[Photo]) -> Pictures:
    if photos[0].mask is None:
        return Pictures([photo.image for photo in photos], None)
    empty = [photo.name for photo in photos if not photo.mask.any()]
    if empty:
        raise UserError(f"{empty[0]}: its mask shows no subject; expected it bright on black; correct the mask")
    return Pictures([photo.image for photo in photos], [photo.mask for photo in photos])


def is_picture(path: Path) -> bool:
    return is_candidate(path) and not GRID.fullmatch(path.name)


def read(job: Job) -> Answers:
    """Pictures that exist: of one prompt all of them; of several, named as `catversion generate` does."""
    keys = ("--images", "--image_masks")
    photos = read_photos(job.source, None, job.image_masks or "", keys, MAX_PICTURES, is_picture)
    if len(job.prompts) == 1:
        return Answers([*job.prompts] * len(photos), pictures_of(photos))
    by_slug = dict(zip(unique_slugs(list(job.prompts)), job.prompts, strict=True))
    found = [(match := DRAWN.fullmatch(photo.name)) and by_slug.get(match[1]) for photo in photos]
    named = "of several prompts, pictures are named <prompt-slug>_<seed>.png, as catversion generate does"
    if None in found:
        raise UserError(f"{job.source / photos[found.index(None)].name}.*: of none of the prompts; {named}")
    if missing := [prompt for prompt in job.prompts if prompt not in found]:
        raise UserError(f"{job.source}: no picture of {len(missing)} prompts, such as {missing[0]!r}; {named}")
    pairs = sorted(zip(found, photos, strict=True), key=lambda pair: job.prompts.index(pair[0]))
    return Answers([prompt for prompt, _ in pairs], pictures_of([photo for _, photo in pairs]))


load_once = functools.cache(load)
"""Concepts of one base model share it."""


def base_model(job: Job, drawing: Drawing) -> Pipeline:
    """The model to draw with. Raises UserError where it is not the concept's, or a prompt lacks the class word."""
    concept = job.concept
    pipeline, unsure = open_model({str(job.source): concept}, drawing.model, drawing.dtype, load_once)
    for warning in unsure:
        tqdm.write(f"catversion: warning: {warning}")
    without = without_word(pipeline.tokenizer, concept.class_word, job.prompts)
    if concept.class_word and without:
        raise UserError(
            f"--prompt={without[0]!r}: no class word {concept.class_word!r}, which the concept was learned with; "
            "write it into the prompt"
        )
    return pipeline


def paint(
    pipeline: Pipeline, prompts: Sequence[str], drawing: Drawing, concepts: Sequence[Concept], name: str = ""
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """A picture of each prompt with each seed; `name` is whose progress is shown."""
    each = [prompt for prompt in prompts for _ in drawing.seeds]
    seeds = list(drawing.seeds) * len(prompts)
    drawn = sampling.paint(pipeline, each, seeds, drawing.sampler, concepts, drawing.strength)
    return list(tqdm(drawn, total=len(each), unit=" pictures", desc=name, leave=False))


@functools.cache
def paint_base(pipeline: Pipeline, prompts: tuple[str, ...], drawing: Drawing) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The base model's pictures, which concepts share."""
    return paint(pipeline, prompts, drawing, ())


def draw(job: Job, drawing: Drawing, judges: Judges) -> Answers:
    """Pictures of the concept, their masks where the references have some, and how far the base model moved."""
    concept = job.concept
    pipeline = base_model(job, drawing)
    photos = read_references(job, pipeline.networks.resolution)
    masked = photos[0].mask is not None and bool(concept.class_word)
    if drawing.grabcut and not masked:
        raise UserError("--grabcut: nothing to mask without --masks of the references and a class word")
    prompts = [prompt for prompt in job.prompts for _ in drawing.seeds]
    images = paint(pipeline, job.prompts, drawing, [concept], job.name)
    unrelated = measure_drift(pipeline, concept, drawing, judges)
    if not masked:
        return Answers(prompts, Pictures(images, None), unrelated)

    def see(images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]) -> list[Bool[np.ndarray, "H W"]]:
        rough = masks.attention_masks(pipeline, images, prompts, concept.class_word)
        return list(map(grabcut, images, rough)) if drawing.grabcut else list(rough)

    found = see(np.stack([photo.image for photo in photos]), [plain_prompt(concept)] * len(photos))
    overlaps = [masks.iou(mask, photo.mask) for mask, photo in zip(found, photos, strict=True)]
    return Answers(prompts, Pictures(images, see(np.stack(images), prompts)), unrelated, float(np.mean(overlaps)))


def measure_drift(pipeline: Pipeline, concept: Concept, drawing: Drawing, judges: Judges) -> dict[str, Values]:
    """The drift of each unrelated prompt that does not hold the class word."""
    prompts = tuple(without_word(pipeline.tokenizer, concept.class_word, drawing.unrelated))
    if not prompts:
        return {}
    pictures = (paint_base(pipeline, prompts, drawing), paint(pipeline, prompts, drawing, [concept]))
    drawn = (np.split(np.stack(images), len(prompts)) for images in pictures)
    states = (
        (context(pipeline, [p]).states, context(pipeline, [p], [concept], drawing.strength).states) for p in prompts
    )
    return {
        prompt: scores.of_unrelated(base, moved, of_prompt, judges)
        for prompt, base, moved, of_prompt in zip(prompts, *drawn, states, strict=True)
    }


def plain_prompt(concept: Concept) -> str:
    """The prompt for the references: the first with the class word that the concept was learned with."""
    templates = (*concept.templates, "a photo of {concept}")
    template = next(template for template in templates if "{concept}" in template or "{class_word}" in template)
    return config.fill(template, concept.class_word, config.article(concept.class_word))
