"""Masks for photos that have none, and photos as they look with theirs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.data.photos import Photo
from catversion_jax.evaluation.grabcut import grabcut
from catversion_jax.evaluation.masks import attention_masks
from catversion_jax.training.training_prompts import training_prompts
from catversion_jax.utils.types import UInt8


def with_masks(config: Config, pipeline: BasePipeline, photos: Sequence[Photo]) -> list[Photo]:
    """Returns the photos with masks: the base model's attention to the class word, refined along edges."""
    prompts = training_prompts(config, config.make_method(pipeline.networks), pipeline, photos)
    images = np.stack([photo.image for photo in photos])
    texts = [prompts.texts[first] for first in prompts.first_prompt]
    rough = attention_masks(pipeline, images, texts, config.concept.class_word)
    return [replace(photo, mask=grabcut(photo.image, mask)) for photo, mask in zip(photos, rough, strict=True)]


def subject(photo: Photo) -> UInt8[np.ndarray, "h w 3"] | None:
    """Returns the photo with its background dimmed; None for one without a mask."""
    if photo.mask is None:
        return None
    return np.where(photo.mask[..., None], photo.image, photo.image // 5 + 24).astype(np.uint8)
