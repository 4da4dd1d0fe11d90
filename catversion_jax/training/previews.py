"""Images that show how a run is going: validation images of the config's prompts, and the sample grid at its end."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.data.photos import Photo
from catversion_jax.methods.concept_file import Concept
from catversion_jax.sampling.sampler import SampleRequest, sample_images
from catversion_jax.utils.image_grid import grid


def sample_prompts(
    config: Config, pipeline: BasePipeline, concepts: Sequence[Concept], count: int | None = None
) -> list[np.ndarray]:
    """Samples an image of each of the first `count` (None: all) of the config's prompts, with the config's seed."""
    request = SampleRequest.every(config.sample_prompts(count), [config.seed], config.sample.sampler)
    return list(sample_images(pipeline, request, concepts))


def sample_preview(config: Config, pipeline: BasePipeline, concept: Concept, count: int) -> Image.Image:
    """Returns the images of the first `count` of the config's prompts, in a row."""
    sampler = replace(config.sample, batch_size=min(count, config.sample.batch_size))
    images = sample_prompts(replace(config, sample=sampler), pipeline, [concept], count)
    return preview_of(images, config)


def preview_of(images: Sequence[np.ndarray], config: Config) -> Image.Image:
    """Returns images of the config's first prompts in a row, each under its prompt."""
    return grid([images], [f"your {config.concept.class_word}"], config.sample_prompts(len(images)))


def sample_grid(
    config: Config, photos: Sequence[Photo], base: Sequence[np.ndarray], personalized: Sequence[np.ndarray]
) -> Image.Image:
    """Returns a grid of the photos, the base model's images and the personalized images of the config's prompts."""
    rows = [[photo.image for photo in photos[: len(base)]], base, personalized]
    labels = ["your photos", "base model", f"your {config.concept.class_word}"]
    return grid(rows, labels, config.sample_prompts(), captions_above=1)
