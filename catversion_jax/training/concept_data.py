"""Prepares a concept's photos and prompts for the training step, which needs neither the VAE nor the tokenizer."""

import hashlib
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.base.text_states import lower_layers
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import find_word, without_word
from catversion_jax.config import Config
from catversion_jax.data.latents import bucket, pad, posteriors
from catversion_jax.data.photos import Photo
from catversion_jax.methods.base import Method
from catversion_jax.sampling.sampler import SampleRequest, sample_latents
from catversion_jax.training.state import ConceptData
from catversion_jax.utils.errors import UserError, listed, short
from catversion_jax.utils.files import read_bytes, write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.types import Float, Int

MOST_HEADER = 4096
"""More than the header of a .npy file and a digest take."""


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
    size: int = 0,
    kept: AnyPath | None = None,
) -> ConceptData:
    """Returns the latents and text states of one concept, with a concept axis of size 1.

    They are padded to `size` photos or to their bucket. If the method preserves a prior, they include the images of the
    class, whose latents are cached in the file `kept`.
    """
    networks = pipeline.networks
    images = np.stack([photo.image for photo in photos])
    mean, std = posteriors(networks.vae, pipeline.params["vae"], images, config.data.flip)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UserError("the VAE gives NaN or infinity for the photos; check the base model's weights")
    prompts = config.concept.prompts(config.concept.templates)
    weight = subject_weights(photos, mean.shape, config.train.background_weight)
    prior = None
    if method.prior_weight:
        prior = class_images(config, method, pipeline, prompts, kept)
        weight = np.ones((*mean.shape[:-1], 1), np.float32) if weight is None else weight
    tokenizers, word = pipeline.tokenizers, config.concept.class_word
    token_ids = [prompt_tokens(method, tokenizer, prompts, word) for tokenizer in tokenizers]
    size = max(size, bucket(len(photos)))
    data = to_data(config, method, pipeline, Images(mean, std, weight), token_ids, size).replace(prior=prior)
    return jax.tree.map(lambda x: np.asarray(x)[None], data)


def check_prompts(config: Config, method: Method, pipeline: BasePipeline) -> None:
    """Raises UserError if nothing could be learned, as no training prompt has a place where the concept enters.

    Warns of the prompts that have none, or that lack the class word.
    """
    word = config.concept.class_word
    prompts = config.concept.prompts(config.concept.templates)
    where = method.word(word)
    warned: set[str] = set()
    for tokenizer in pipeline.tokenizers:
        last = find_word(tokenizer, prompt_tokens(method, tokenizer, prompts, word), where)
        # The methods with an identifier change the UNet for all prompts, but what they learn is called by it.
        entered = last >= 0 if method.identifier else np.any(method.token_mask(last, tokenizer.length), (1, 2))
        idle = [prompt for prompt, enters in zip(prompts, entered, strict=True) if not enters]
        if len(idle) == len(prompts):
            check_length(tokenizer, where)
            raise UserError(
                f"config.concept.templates: nothing would be learned, as the prompts ({told_prompts(tokenizer, idle)}) "
                f"have no place for the concept: they do not hold {where!r}; write {{concept}} near their beginning"
            )
        lacked = {where: idle, word: without_word([tokenizer], word, prompts)}
        if found := [(what, those) for what, those in lacked.items() if those and not warned & set(those)]:
            what, those = found[0]
            warn(f"training prompts without {what!r}: {told_prompts(tokenizer, those)}")
            warned |= set(those)


def check_length(tokenizer: Tokenizer, word: str) -> None:
    """Raises UserError if a word alone is too long for the text encoder, so that no prompt could hold it."""
    size, most = len(tokenizer.word(word)), tokenizer.length - 2
    if size > most:
        raise UserError(
            f"{word!r:.60}: {size} tokens; expected a class word or identifier of at most {most}; shorten it"
        )


def prompt_tokens(
    method: Method, tokenizer: Tokenizer, prompts: Sequence[str], class_word: str
) -> Int[np.ndarray, "T Q"]:
    """Returns the tokens of prompts as a text encoder is given them, with the method's identifier if it has one."""
    return tokenizer.fit([method.prompt_ids(tokenizer, tokenizer.word(prompt), class_word) for prompt in prompts])


def told_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> str:
    """Names prompts, and says which of them are cut off at the text encoder's length."""
    cut = f", cut off after {tokenizer.length} tokens"
    most = tokenizer.length - 2
    return listed(f"{p!r:.100}{cut if len(tokenizer.word(p)) > most else ''}" for p in dict.fromkeys(prompts))


def to_data(
    config: Config,
    method: Method,
    pipeline: BasePipeline,
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
    if not all(np.isfinite(np.asarray(states.hidden, np.float32)).all() for states in lowered):
        raise UserError("the text encoder gives NaN or infinity; check the base model's weights and model.dtype")
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
    config: Config, method: Method, pipeline: BasePipeline, prompts: Sequence[str], kept: AnyPath | None
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
            write_atomically(kept, lambda path: path.write_bytes(latents_to_npy(sampled)))
        latents = sampled
    mean = latents[:, None]
    weight = np.full((*mean.shape[:-1], 1), method.prior_weight, np.float32)
    token_ids = [tokenizer(prompts) for tokenizer in pipeline.tokenizers]
    return to_data(config, method, pipeline, Images(mean, np.zeros_like(mean), weight), token_ids, bucket(count))


def sample_class(pipeline: BasePipeline, request: SampleRequest) -> Float[np.ndarray, "N h w c"]:
    """Samples the latents of the request's images, with a progress bar."""
    parts = []
    with tqdm(total=len(request.prompts), unit=" images", desc="of the class", leave=False) as bar:
        for latents, real in sample_latents(pipeline, request):
            parts.append(np.asarray(latents)[:real])
            bar.update(real)
    return np.concatenate(parts)


def latents_to_npy(latents: Float[np.ndarray, "..."]) -> bytes:
    """Returns the latents as a .npy file with a digest behind it."""
    file = io.BytesIO()
    np.save(file, latents, allow_pickle=False)
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


def latents_from_npy(data: bytes, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Returns what `latents_to_npy` was given. Raises an error for anything else; older files have no digest."""
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    if np.lib.format.read_array_header_1_0(file) != (shape, False, np.dtype(np.float32)):
        raise ValueError("other latents than this run needs")
    start, end = file.tell(), file.tell() + 4 * math.prod(shape)
    if len(data) < end or data[end:] not in (b"", hashlib.sha256(data[:end]).digest()):
        raise ValueError("damaged")
    return np.frombuffer(data[start:end], np.float32).reshape(shape)


def read_latents(path: AnyPath, shape: tuple[int, ...]) -> Float[np.ndarray, "..."] | None:
    """Returns the file's latents; None if there is no file or, with a warning, if it is damaged or has others."""
    if not path.exists():
        return None
    try:
        data = read_bytes(path, 4 * math.prod(shape) + MOST_HEADER, "expected latents of this run's class images")
        return latents_from_npy(data, shape)
    except OSError:
        raise
    except Exception as error:  # numpy's parser of headers raises whatever it stumbles over
        warn(f"{path}: {short(error)}; the images of the class are sampled again")
        return None
