"""Samples images of any number of prompts, one batch of fixed size at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base import schedulers
from catversion_jax.base.pipeline import BasePipeline, Networks
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_file import Concept
from catversion_jax.sampling.branches import batch_key, batches_of, branches_of, join_branches
from catversion_jax.sampling.conditioning import condition, with_unet
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
    batches = latent_batches(pipeline, request, [concepts] * len(request.prompts))
    return (image for _, image in decoded_images(pipeline, request, batches))


def sample_each(
    pipeline: BasePipeline, request: SampleRequest, of_each: Sequence[Sequence[Concept]]
) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Returns an iterator over the request's images, each with concepts of its own, and their indices.

    Images of different concepts share a batch. They come in the order in which most of them can.
    """
    return decoded_images(pipeline, request, latent_batches(pipeline, request, of_each, in_order=False))


def decoded_images(
    pipeline: BasePipeline,
    request: SampleRequest,
    batches: Iterable[tuple[list[int], Float[Array, "B h w c"]]],
) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Yields the images of batches of latents, and their indices."""
    start = request.start
    for indices, latents in batches:
        decoded, finite = decode_latents(pipeline.params["vae"], latents, networks=pipeline.networks)
        check_finite(finite, "VAE")
        for index, image in zip(indices, np.asarray(decoded), strict=False):  # the last batch has more images
            yield index, start.keep(image) if start else image


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
    batches = latent_batches(pipeline, request, [concepts] * len(request.prompts))
    return ((latents, len(images)) for images, latents in batches)


def latent_batches(
    pipeline: BasePipeline, request: SampleRequest, of_each: Sequence[Sequence[Concept]], in_order: bool = True
) -> Iterator[tuple[list[int], Float[Array, "B h w c"]]]:
    """Returns an iterator over batches of the request's images, with the concepts of each: indices and latents.

    A batch may hold more latents than indices. All batches run one compiled program, unless their prompts are of other
    lengths. Not `in_order`, images that can share a batch come together.
    """
    net, sampler = pipeline.networks, request.sampler
    shape = request.latent_shape(net)
    picture = request.start
    skipped = picture.skipped(sampler.steps) if picture else 0
    trajectory = schedulers.plan(net.schedule, sampler.scheduler, sampler.steps, skipped)
    clean = jnp.asarray(clean_latents(pipeline, picture)) if picture else None
    for concepts in {tuple(map(id, concepts)): concepts for concepts in of_each}.values():
        check_composition(concepts)
    # Guidance of 1 is the conditional prediction itself: half of the work.
    negative = [condition(pipeline, [request.negative_prompt])] if sampler.guidance != 1 else []
    asked = [
        (prompt, tuple(concept for concept in concepts if concept.strength))
        for prompt, concepts in zip(request.prompts, of_each, strict=True)
    ]
    # Of images with the same prompt and concepts, the first; concepts are told apart by identity, not by their arrays.
    seen: dict[tuple, int] = {}
    alike = [seen.setdefault((prompt, *map(id, concepts)), i) for i, (prompt, concepts) in enumerate(asked)]
    key_of_first = {i: batch_key(pipeline, *asked[i]) for i in seen.values()}
    keys = [key_of_first[i] for i in alike]
    order = range(len(keys)) if in_order else sorted(range(len(keys)), key=keys.__getitem__)
    by_id = {id(concept): concept for _, concepts in asked for concept in concepts}
    conditioned = lru_cache(sampler.batch_size)(lambda first: branches_of(pipeline, *asked[first]))
    unet_of = lru_cache(1)(lambda unet: with_unet(pipeline, by_id.get(unet)).params["unet"])

    def batch(images: list[int]) -> tuple[list[int], Float[Array, "B h w c"]]:
        # The last image is repeated to fill the batch, so that one compiled program serves all batches.
        index = images + images[-1:] * (sampler.batch_size - len(images))
        seeds = jnp.asarray([request.seeds[i] for i in index], jnp.uint32)
        context, of_words = join_branches([conditioned(alike[i]) for i in index], negative)
        noise = initial_latents(seeds, shape)
        clean_start, kept = started_from(picture, clean, noise, net)
        guided = Guided(seeds, context, jnp.float32(sampler.guidance), of_words, kept)
        state = trajectory.start(noise, clean_start)
        unet = unet_of(keys[index[0]].unet)
        latents = denoise(unet, state, guided, trajectory, networks=net)
        check_finite(all_finite(context), "text encoder")
        check_finite(all_finite(latents), "UNet")
        return images, latents

    return map(batch, batches_of(keys, order, sampler.batch_size))
