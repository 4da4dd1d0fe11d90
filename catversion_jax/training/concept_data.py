"""Prepares a concept's photos and prompts for the training step, which needs neither the VAE nor the tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.base.text_states import lower_layers
from catversion_jax.base.words import find_word, without_word
from catversion_jax.config import Config
from catversion_jax.data.latents import bucket, pad, posteriors
from catversion_jax.data.photos import Photo
from catversion_jax.methods.base import Method
from catversion_jax.sampling.sampler import SampleRequest, sample_latents
from catversion_jax.training.state import ConceptData
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.types import Float, Int


class Images(NamedTuple):
    """Latents of photos, or of images of the class."""

    mean: Float[np.ndarray, "N F h w c"]
    std: Float[np.ndarray, "N F h w c"]
    weight: Float[np.ndarray, "N F h w 1"] | None  # of each position in the loss; None: all equal


def prepare(
    config: Config,
    method: Method,
    pipeline: Pipeline,
    photos: Sequence[Photo],
    size: int = 0,
    kept: Path | None = None,
) -> ConceptData:
    """Returns the latents and text states of one concept, with a concept axis of size 1.

    They are padded to `size` photos or to their bucket. If the method preserves a prior, they include the images of the
    class, whose latents are cached in the file `kept`.
    """
    networks = pipeline.networks
    images = np.stack([photo.image for photo in photos])
    mean, std = posteriors(networks.vae, pipeline.params["vae"], images, config.data.flip)
    prompts = config.concept.prompts(config.concept.templates)
    weight = subject_weights(photos, mean.shape, config.train.background_weight)
    prior = None
    if method.prior_weight:
        prior = class_images(config, method, pipeline, prompts, kept)
        weight = np.ones((*mean.shape[:-1], 1), np.float32) if weight is None else weight
    for prompt in without_word(pipeline.tokenizers, config.concept.class_word, prompts):
        warn(f"the training prompt {prompt!r} does not hold the class word {config.concept.class_word!r}")
    word = config.concept.class_word
    token_ids = [
        tokenizer.fit([method.prompt_ids(tokenizer, tokenizer.word(prompt), word) for prompt in prompts])
        for tokenizer in pipeline.tokenizers
    ]
    size = max(size, bucket(len(photos)))
    data = to_data(config, method, pipeline, Images(mean, std, weight), token_ids, size).replace(prior=prior)
    return jax.tree.map(lambda x: np.asarray(x)[None], data)


def to_data(
    config: Config,
    method: Method,
    pipeline: Pipeline,
    images: Images,
    token_ids: Sequence[Int[np.ndarray, "T Q"]],
    size: int,
) -> ConceptData:
    """Converts images, and prompts as the tokens of each text encoder, to data without a concept axis."""
    networks, word, count = pipeline.networks, method.word(config.concept.class_word), len(token_ids[0])
    masks = [
        method.token_mask(find_word(tokenizer, ids, word), tokenizer.length)
        for tokenizer, ids in zip(pipeline.tokenizers, token_ids, strict=True)
    ]
    of_encoders = (networks.text, pipeline.params["text"], token_ids, masks, method.first_layers(networks))
    # Nothing learned reaches the lower layers, so they run once per prompt here and not in every step.
    lowered = tuple(
        lower_layers(encoder, params, ids, mask, stop=first)
        for encoder, params, ids, mask, first in zip(*of_encoders, strict=True)
    )
    length = bucket(count)
    return ConceptData(
        mean=pad(images.mean, size),
        std=pad(images.std, size),
        photos=np.asarray(len(images.mean), np.int32),
        prompts=jax.tree.map(lambda x: pad(np.asarray(x), length), lowered),
        prompt_count=np.asarray(count, np.int32),
        steps=np.asarray(config.train.steps, np.int32),
        weight=None if images.weight is None else pad(images.weight, size),
    )


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


def class_images(
    config: Config, method: Method, pipeline: Pipeline, prompts: Sequence[str], kept: Path | None
) -> ConceptData:
    """Returns the base model's images of the class, for the training prompts in turn, without the identifier.

    They remain latents, so the VAE is not used, and are not sampled again if the file `kept` has them.
    """
    count = config.prior.pictures
    latents = read_latents(kept, (count, *pipeline.networks.latent_shape)) if kept else None
    if latents is None:
        asked = tuple(prompts[i % len(prompts)] for i in range(count))
        sampled = sample_class(pipeline, SampleRequest(asked, tuple(range(count)), config.sample.sampler))
        if kept:
            write_atomically(kept, lambda path: np.save(path, sampled, allow_pickle=False))
        latents = sampled
    mean = latents[:, None]
    weight = np.full((*mean.shape[:-1], 1), method.prior_weight, np.float32)
    token_ids = [tokenizer(prompts) for tokenizer in pipeline.tokenizers]
    return to_data(config, method, pipeline, Images(mean, np.zeros_like(mean), weight), token_ids, bucket(count))


def sample_class(pipeline: Pipeline, request: SampleRequest) -> Float[np.ndarray, "N h w c"]:
    """Samples the latents of the request's images, with a progress bar."""
    parts = []
    with tqdm(total=len(request.prompts), unit=" images", desc="of the class", leave=False) as bar:
        for latents, real in sample_latents(pipeline, request):
            parts.append(np.asarray(latents)[:real])
            bar.update(real)
    return np.concatenate(parts)


def read_latents(path: Path, shape: tuple[int, ...]) -> Float[np.ndarray, "..."] | None:
    """Returns the file's latents; None if it has none of this shape."""
    try:
        latents = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return latents if latents.shape == shape and latents.dtype == np.float32 else None
