"""A concept's photos and prompts as the training step takes them: the VAE and the tokenizer are done before it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import Pipeline
from catversion_jax.base.text_states import lower_layers
from catversion_jax.base.tokenizer import without_word
from catversion_jax.config import Config
from catversion_jax.data.latents import bucket, pad, posteriors
from catversion_jax.data.photos import Photo
from catversion_jax.methods.base import Method
from catversion_jax.sampling.sampler import SampleRequest, sample_latents
from catversion_jax.training.state import ConceptData
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.types import Float


class Images(NamedTuple):
    """Photos, or images of the class, as latents."""

    mean: Float[np.ndarray, "N F h w c"]
    std: Float[np.ndarray, "N F h w c"]
    weight: Float[np.ndarray, "N F h w 1"] | None  # of each position in the loss; None: all alike


def prepare(
    config: Config,
    method: Method,
    pipeline: Pipeline,
    photos: Sequence[Photo],
    size: int = 0,
    kept: Path | None = None,
) -> ConceptData:
    """Latents and text states of one concept, padded to `size` photos or to their bucket, with a concept axis of size
    1; and, if the method preserves a prior, those of the class, whose latents the file `kept` keeps."""
    networks = pipeline.networks
    images = np.stack([photo.image for photo in photos])
    mean, std = posteriors(networks.vae, pipeline.params["vae"], images, config.data.flip)
    prompts = config.concept.prompts(config.concept.templates)
    weight = subject_weights(photos, mean.shape, config.train.background_weight)
    prior = None
    if method.prior_weight:
        prior = class_images(config, method, pipeline, prompts, kept)
        weight = np.ones((*mean.shape[:-1], 1), np.float32) if weight is None else weight
    for prompt in without_word(pipeline.tokenizer, config.concept.class_word, prompts):
        warn(f"the training prompt {prompt!r} does not hold the class word {config.concept.class_word!r}")
    entering = [method.prompt(prompt, config.concept.class_word) for prompt in prompts]
    size = max(size, bucket(len(photos)))
    data = to_data(config, method, pipeline, Images(mean, std, weight), entering, size).replace(prior=prior)
    return jax.tree.map(lambda x: np.asarray(x)[None], data)


def to_data(
    config: Config, method: Method, pipeline: Pipeline, images: Images, prompts: Sequence[str], size: int
) -> ConceptData:
    """Images and prompts, which are as the text encoder is given them, without a concept axis."""
    networks = pipeline.networks
    token_ids = [tokenizer(list(prompts)) for tokenizer in pipeline.tokenizers]
    word = pipeline.tokenizer.word(method.identifier or config.concept.class_word)
    of_encoders = zip(networks.text, pipeline.params["text"], token_ids, method.first_layers(networks), strict=True)
    lowered = tuple(
        lower_layers(encoder, params, ids, method.token_mask(ids, word), stop=first)
        for encoder, params, ids, first in of_encoders
    )
    length = bucket(len(prompts))
    return ConceptData(
        mean=pad(images.mean, size),
        std=pad(images.std, size),
        photos=np.int32(len(images.mean)),
        prompts=jax.tree.map(lambda x: pad(np.asarray(x), length), lowered),
        prompt_count=np.int32(len(prompts)),
        steps=np.int32(config.train.steps),
        weight=None if images.weight is None else pad(images.weight, size),
    )


def check_masks(photos: Sequence[Photo], background: float) -> None:
    """Raises UserError if the loss is to weigh the background and a photo has no mask."""
    missing = [photo.name for photo in photos if photo.mask is None or not photo.mask.any()]
    if background != 1 and missing:
        raise UserError(
            f"config.train.background_weight={background}: photo {missing[0]} has no mask, or an empty one; give masks "
            "as config.data.masks_dir"
        )


def subject_weights(
    photos: Sequence[Photo], shape: tuple[int, ...], background: float
) -> Float[np.ndarray, "N F h w 1"] | None:
    """How much each position of the latents [N, F, h, w, c] counts in the loss: the subject's share of it and, for the
    rest, `background`; the mean over a photo is 1. None if all positions count alike. The photos have masks."""
    if background == 1:
        return None
    _, views, height, width, _ = shape
    masks = np.stack([photo.mask for photo in photos]).astype(np.float32)
    side = masks.shape[1] // height
    share = masks.reshape(len(masks), height, side, width, side).mean((2, 4))
    weights = background + (1 - background) * share
    weights /= weights.mean((1, 2), keepdims=True)
    return np.stack([weights, weights[:, :, ::-1]][:views], axis=1)[..., None]


def class_images(
    config: Config, method: Method, pipeline: Pipeline, prompts: Sequence[str], kept: Path | None
) -> ConceptData:
    """The base model's images of the class, of the training prompts in turn and without the identifier. They stay
    the latents they were sampled as, and are not sampled again if the file `kept` has them: no VAE."""
    count = config.prior.pictures
    mean = kept and read_latents(kept, (count, *pipeline.networks.latent_shape))
    if mean is None:
        asked = tuple(prompts[i % len(prompts)] for i in range(count))
        batches = sample_latents(pipeline, SampleRequest(asked, tuple(range(count)), config.sample.sampler))
        with tqdm(total=count, unit=" images", desc="of the class", leave=False) as bar:
            sampled = []
            for latents, real in batches:
                sampled.append(np.asarray(latents)[:real])
                bar.update(real)
        mean = np.concatenate(sampled)
        if kept:
            write_atomically(kept, lambda path: np.save(path, mean, allow_pickle=False))
    mean = mean[:, None]
    weight = np.full((*mean.shape[:-1], 1), method.prior_weight, np.float32)
    return to_data(config, method, pipeline, Images(mean, np.zeros_like(mean), weight), prompts, bucket(count))


def read_latents(path: Path, shape: tuple[int, ...]) -> Float[np.ndarray, "..."] | None:
    """The file's latents; None where it has none of this shape."""
    try:
        latents = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return latents if latents.shape == shape and latents.dtype == np.float32 else None
