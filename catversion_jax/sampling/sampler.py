"""Samples images of any number of prompts, one batch of fixed size at a time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base import schedulers
from catversion_jax.base.pipeline import BasePipeline, Networks
from catversion_jax.base.prompt_tokens import word_weights
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_file import Concept
from catversion_jax.models.unet import Context
from catversion_jax.sampling.conditioning import condition, same_length, tokens_of, with_unet
from catversion_jax.sampling.denoising import Guided, decode_latents, denoise, initial_latents
from catversion_jax.sampling.picture_input import Kept, PictureInput, check_size_of_image, clean_latents, drawn_latents
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Array, Bool, Float, UInt8


@dataclass(frozen=True)
class SampleRequest:
    """Images to sample: one for each prompt and its seed."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: SamplerConfig = SamplerConfig()
    negative_prompt: str = ""
    width: int = 0  # pixels; 0: the base model's own
    height: int = 0
    start: PictureInput | None = None  # that sampling starts from; None: noise alone

    def size(self, networks: Networks) -> tuple[int, int]:
        """Returns width and height in pixels. Raises UserError for sizes that the networks do not give."""
        own = self.start.pixels.shape[1::-1] if self.start else (networks.resolution, networks.resolution)
        size = (self.width or own[0], self.height or own[1])
        if self.start and size != own:
            raise UserError(f"size {size}: expected that of the picture to start from, {own}")
        check_size_of_image(*size, networks)
        return size

    def latent_shape(self, networks: Networks) -> tuple[int, int, int]:
        """Returns height, width and channels of each image's latents."""
        width, height = (pixels // networks.vae.config.downscale for pixels in self.size(networks))
        return height, width, networks.unet.config.in_channels

    @classmethod
    def every(cls, prompts: Sequence[str], seeds: Sequence[int], *rest: Any) -> "SampleRequest":
        """Returns the request for every prompt with every seed, ordered by prompt."""
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        return cls(tuple(prompt for prompt, _ in pairs), tuple(seed for _, seed in pairs), *rest)


def sample_images(
    pipeline: BasePipeline, request: SampleRequest, concepts: Sequence[Concept] = ()
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Returns an iterator over the request's images, in its order, which are sampled on demand.

    Each concept acts at its own strength, and several act at their own places (regions.py). An image depends on its
    prompt and seed, not on its neighbours. The negative (or unconditional) branch never sees a concept. Raises
    UserError at once if the scheduler does not allow that many steps, the size cannot be or the concepts cannot share a
    prompt, and on demand if a network gives NaN or infinity, which would become black images.
    """

    start = request.start

    def images(latents: Float[Array, "B h w c"]) -> UInt8[np.ndarray, "B H W 3"]:
        decoded, finite = decode_latents(pipeline.params["vae"], latents, networks=pipeline.networks)
        check_finite(finite, "VAE")
        images = np.asarray(decoded)
        return np.stack([start.keep(image) for image in images]) if start else images

    batches = sample_latents(pipeline, request, concepts)
    return itertools.chain.from_iterable(images(latents)[:real] for latents, real in batches)


@jax.jit
def all_finite(arrays: Any) -> Bool[Array, ""]:
    """Whether all numbers of a tree of arrays are finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(arrays)]).all()


def check_finite(finite: Bool[Array, ""] | bool, network: str) -> None:
    """Raises UserError, naming the network, unless its output is finite."""
    if not finite:
        raise UserError(
            f"the {network} gives NaN or infinity; choose another dtype, guidance or scheduler, or check the concept"
        )


def branches(
    pipeline: BasePipeline, prompts: Sequence[str], concepts: Sequence[Concept]
) -> tuple[list[Context], Float[np.ndarray, "W B K"] | None]:
    """Returns the conditioning of each conditional branch, and where the words of several concepts are.

    One concept has one branch. Several have one each, behind the base model's. All prompts have as many chunks.
    """
    if len(concepts) < 2:
        return [condition(pipeline, prompts, concepts[0] if concepts else None)], None
    each = [condition(pipeline, prompts, c, [other for other in concepts if other is not c]) for c in concepts]
    tokens, words = tokens_of(pipeline, prompts, None)[0], [concept.class_word for concept in concepts]
    return [condition(pipeline, prompts), *each], word_weights(pipeline.tokenizer, tokens, words)


def batches_of(chunks: Sequence[int], size: int) -> list[list[int]]:
    """Returns the indices of images in batches of at most `size`, whose prompts have as many chunks each.

    So an image does not depend on how long the prompts of its neighbours are.
    """
    each = (list(group) for _, group in itertools.groupby(range(len(chunks)), key=chunks.__getitem__))
    return [group[start : start + size] for group in each for start in range(0, len(group), size)]


def started_from(
    start: PictureInput | None,
    clean: Float[Array, "1 h w c"] | None,
    noise: Float[Array, "B h w c"],
    networks: Networks,
) -> tuple[Float[Array, "B h w c"] | None, Kept | None]:
    """Returns the clean latents that a batch starts from (None: noise alone), and what of them stays to its end."""
    if start is None or clean is None:
        return None, None
    clean = jnp.broadcast_to(clean, noise.shape)
    if start.mask is None:
        return clean, None
    kept = Kept(clean, noise, jnp.asarray(drawn_latents(start.mask, networks)))
    # As diffusers' pipeline for inpainting: with all steps nothing of the picture remains inside the mask.
    return (clean if start.denoise < 1 else None), kept


def sample_latents(
    pipeline: BasePipeline, request: SampleRequest, concepts: Sequence[Concept] = ()
) -> Iterator[tuple[Float[Array, "B h w c"], int]]:
    """Returns an iterator over the latents of `sample_images`: a batch, and how many of its images were requested."""
    net, sampler = pipeline.networks, request.sampler
    size = sampler.batch_size
    shape = request.latent_shape(net)
    picture = request.start
    skipped = picture.skipped(sampler.steps) if picture else 0
    trajectory = schedulers.plan(net.schedule, sampler.scheduler, sampler.steps, skipped)
    clean = jnp.asarray(clean_latents(pipeline, picture)) if picture else None
    # One call per dispatch on a CPU: XLA's CPU convolutions are slow in a loop's body (docs/performance.md).
    calls_per_dispatch = 1 if jax.default_backend() == "cpu" else len(trajectory.calls.number)
    check_composition(concepts)
    acting = [concept for concept in concepts if concept.strength]
    first = acting[0] if acting else None
    unet = with_unet(pipeline, first).params["unet"]
    # Guidance of 1 is the conditional prediction itself: half of the work.
    negative = [condition(pipeline, [request.negative_prompt])] if sampler.guidance != 1 else []

    chunks_of = {prompt: len(tokens_of(pipeline, [prompt], first)[0][0].ids) for prompt in {*request.prompts}}
    chunks = [chunks_of[prompt] for prompt in request.prompts]

    def batch(images: list[int]) -> tuple[Float[Array, "B h w c"], int]:
        # The last image is repeated to fill the batch, so that one compiled program serves all batches.
        index = images + images[-1:] * (size - len(images))
        prompts = [request.prompts[i] for i in index]
        seeds = jnp.asarray([request.seeds[i] for i in index], jnp.uint32)
        contexts, of_words = branches(pipeline, prompts, acting)
        contexts = same_length([*negative, *contexts])
        if of_words is not None:
            of_words = np.tile(of_words, contexts[-1].states.shape[1] // of_words.shape[2])
        # The last one has the whole batch's shape.
        context = jax.tree.map(lambda *each: jnp.stack([jnp.broadcast_to(x, each[-1].shape) for x in each]), *contexts)
        noise = initial_latents(seeds, shape)
        clean_start, kept = started_from(picture, clean, noise, net)
        guided = Guided(seeds, context, jnp.float32(sampler.guidance), of_words, kept)
        state = trajectory.start(noise, clean_start)
        latents = denoise(unet, state, guided, trajectory, networks=net, calls_per_dispatch=calls_per_dispatch)
        check_finite(all_finite(context), "text encoder")
        check_finite(all_finite(latents), "UNet")
        return latents, len(images)

    return map(batch, batches_of(chunks, size))
