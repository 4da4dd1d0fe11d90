"""Prepares a concept's photos and prompts for the training step, which needs neither the VAE nor the tokenizer."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.base.text_states import PromptStates, lower_layers
from catversion_jax.base.words import find_word
from catversion_jax.config import Config
from catversion_jax.data.latents import bucket, pad, posteriors
from catversion_jax.data.photos import Photo
from catversion_jax.methods.base import Method
from catversion_jax.models.clip import CLIPTextModel
from catversion_jax.training.class_images import class_latents
from catversion_jax.training.state import ConceptData
from catversion_jax.training.training_prompts import prompt_tokens, training_prompts
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.types import Bool, Float, Int, Params

PROMPTS_AT_ONCE = 8


class Room(NamedTuple):
    """How many photos and prompts a concept's data have room for, at least."""

    photos: int = 0
    prompts: int = 0


class Images(NamedTuple):
    """Latents of photos, or of images of the class."""

    mean: Float[np.ndarray, "N F h w c"]
    std: Float[np.ndarray, "N F h w c"]
    weight: Float[np.ndarray, "N F h w 1"] | None  # of each position in the loss; None: all equal


def prepare(
    config: Config,
    method: Method,
    pipeline: BasePipeline,
    photos: Sequence[Photo],
    room: Room = Room(),
    kept: AnyPath | None = None,
) -> ConceptData:
    """Returns the latents and text states of one concept, with a concept axis of size 1.

    They are padded to `room`, or to their buckets if these are larger. If the method preserves a prior, they include
    the images of the class, whose latents are cached in the file `kept`.
    """
    networks = pipeline.networks
    images = np.stack([photo.image for photo in photos])
    mean, std = posteriors(networks.vae, pipeline.params["vae"], images, config.data.flip)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UserError("the VAE gives NaN or infinity for the photos; check the base model's weights")
    prompts = training_prompts(config, method, pipeline, photos)
    weight = subject_weights(photos, mean.shape, config.train.background_weight)
    prior = None
    if method.prior_weight:
        prior = class_images(config, method, pipeline, kept)
        weight = np.ones((*mean.shape[:-1], 1), np.float32) if weight is None else weight
    tokenizers, word = pipeline.tokenizers, config.concept.class_word
    token_ids = [prompt_tokens(method, tokenizer, prompts.texts, word) for tokenizer in tokenizers]
    data = to_data(config, method, pipeline, Images(mean, std, weight), token_ids, room)
    first, count = (pad(x, len(data.mean)) for x in (prompts.first_prompt, prompts.prompt_count))
    data = data.replace(first_prompt=first, prompt_count=count, prior=prior)
    return jax.tree.map(lambda x: np.asarray(x)[None], data)


def to_data(
    config: Config,
    method: Method,
    pipeline: BasePipeline,
    images: Images,
    token_ids: Sequence[Int[np.ndarray, "T Q"]],
    room: Room = Room(),
) -> ConceptData:
    """Converts images, and prompts as the tokens of each text encoder, to data without a concept axis.

    Every image has all of the prompts.
    """
    networks, word, count = pipeline.networks, method.word(config.concept.class_word), len(token_ids[0])
    masks = [
        method.token_mask(find_word(tokenizer, ids, word), tokenizer.length)
        for tokenizer, ids in zip(pipeline.tokenizers, token_ids, strict=True)
    ]
    of_encoders = (networks.text, pipeline.params["text"], token_ids, masks, method.first_layers(networks))
    # Nothing learned reaches the lower layers, so they run once per prompt here and not in every step.
    lowered = tuple(
        lowered_prompts(encoder, params, ids, mask, first)
        for encoder, params, ids, mask, first in zip(*of_encoders, strict=True)
    )
    if not all(np.isfinite(np.asarray(states.hidden, np.float32)).all() for states in lowered):
        raise UserError("the text encoder gives NaN or infinity; check the base model's weights and model.dtype")
    size, length = max(room.photos, bucket(len(images.mean))), max(room.prompts, bucket(count))
    return ConceptData(
        mean=pad(images.mean, size),
        std=pad(images.std, size),
        photos=np.asarray(len(images.mean), np.int32),
        prompts=jax.tree.map(lambda x: pad(x, length), lowered),
        first_prompt=np.zeros(size, np.int32),
        prompt_count=pad(np.full(len(images.mean), count, np.int32), size),
        steps=np.asarray(config.train.steps, np.int32),
        weight=None if images.weight is None else pad(images.weight, size),
    )


def lowered_prompts(
    encoder: CLIPTextModel,
    params: Params,
    token_ids: Int[np.ndarray, "T Q"],
    token_mask: Bool[np.ndarray, "T Q #P"],
    stop: int,
) -> PromptStates:
    """Runs a text encoder's layers below `stop` on prompts; returns arrays of numpy."""
    # Equal parts, the last one filled up: one compiled program serves any number of captions, and a prompt's states
    # are the same in a run and in a batch.
    count = len(token_ids)
    filled = [(0, -count % PROMPTS_AT_ONCE)]
    ids, mask = (np.pad(x, filled + [(0, 0)] * (x.ndim - 1), "edge") for x in (token_ids, token_mask))
    parts = [
        lower_layers(encoder, params, ids[at : at + PROMPTS_AT_ONCE], mask[at : at + PROMPTS_AT_ONCE], stop=stop)
        for at in range(0, count, PROMPTS_AT_ONCE)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def check_masks(photos: Sequence[Photo], background: float) -> None:
    """Raises UserError if the background has its own weight in the loss and a photo has no mask."""
    missing = [photo.name for photo in photos if photo.mask is None or not photo.mask.any()]
    if background != 1 and missing:
        raise UserError(
            f"config.train.background_weight={background}: photo {missing[0]} has no mask, or an empty one; give masks "
            "as config.data.masks_dir"
        )


def subject_weights(
    photos: Sequence[Photo], shape: tuple[int, ...], background: float
) -> Float[np.ndarray, "N F h w 1"] | None:
    """Returns the loss weight of each latent position; None if all are equal. `shape` is [N, F, h, w, c].

    It is the share of the position that the subject covers plus `background` times the rest, scaled to a mean of 1
    over each photo. All photos must have masks.
    """
    if background == 1:
        return None
    _, views, height, width, _ = shape
    masks = np.stack([photo.mask for photo in photos if photo.mask is not None]).astype(np.float32)
    side = masks.shape[1] // height
    share = masks.reshape(len(masks), height, side, width, side).mean((2, 4))
    weights = background + (1 - background) * share
    weights /= weights.mean((1, 2), keepdims=True)
    return np.stack([weights, weights[:, :, ::-1]][:views], axis=1)[..., None]


def class_images(config: Config, method: Method, pipeline: BasePipeline, kept: AnyPath | None) -> ConceptData:
    """Returns the base model's images of the class, for the templates' prompts without the identifier.

    Their latents are those in the file `kept`, if it has them.
    """
    prompts = config.concept.prompts(config.concept.templates)
    mean = class_latents(config, pipeline, prompts, kept)[:, None]
    weight = np.full((*mean.shape[:-1], 1), method.prior_weight, np.float32)
    token_ids = [tokenizer(prompts) for tokenizer in pipeline.tokenizers]
    return to_data(config, method, pipeline, Images(mean, np.zeros_like(mean), weight), token_ids)
