"""Images of prompts: a fixed batch at a time, whatever their number."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base import schedulers
from catversion_jax.base.pipeline import Pipeline
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.composition import BASE_MODEL, Personalization
from catversion_jax.sampling.conditioning import condition, with_unet
from catversion_jax.sampling.denoising import Guided, decode, denoise, initial_latents
from catversion_jax.utils.types import Array, Float, UInt8


@dataclass(frozen=True)
class SampleRequest:
    """Images to sample: one of each prompt with its seed."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    sampler: SamplerConfig = SamplerConfig()
    negative_prompt: str = ""

    @classmethod
    def every(cls, prompts: Sequence[str], seeds: Sequence[int], *rest: Any) -> "SampleRequest":
        """Every prompt with every seed: the images of the first prompt come first."""
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        return cls(tuple(prompt for prompt, _ in pairs), tuple(seed for _, seed in pairs), *rest)


def sample_images(
    pipeline: Pipeline, request: SampleRequest, personalization: Personalization = BASE_MODEL
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The request's images in its order, sampled as they are asked for.

    An image depends on its prompt and seed, not on its neighbours. The negative (or unconditional) branch never
    sees the prefix. Raises UserError at once for a scheduler that cannot be had in that many steps.
    """

    def images(latents: Float[Array, "B h w c"]) -> UInt8[np.ndarray, "B H W 3"]:
        return np.asarray(decode(pipeline.params["vae"], latents, networks=pipeline.networks))

    batches = sample_latents(pipeline, request, personalization)
    return itertools.chain.from_iterable(images(latents)[:real] for latents, real in batches)


def sample_latents(
    pipeline: Pipeline, request: SampleRequest, personalization: Personalization = BASE_MODEL
) -> Iterator[tuple[Float[Array, "B h w c"], int]]:
    """The latents of `sample_images`, a batch at a time, and how many of the batch are asked for."""
    net, sampler = pipeline.networks, request.sampler
    size, count = sampler.batch_size, len(request.prompts)
    trajectory = schedulers.plan(net.schedule, sampler.scheduler, sampler.steps)
    # On a CPU one call a dispatch, since a loop body's convolutions are slow there.
    calls_per_dispatch = 1 if jax.default_backend() == "cpu" else len(trajectory.calls.index)
    unet = with_unet(pipeline, personalization).params["unet"]
    negative = condition(pipeline, [request.negative_prompt])

    def batch(start: int) -> tuple[Float[Array, "B h w c"], int]:
        real = min(size, count - start)
        index = np.minimum(np.arange(start, start + size), start + real - 1)  # the last one fills up the batch
        positive = condition(pipeline, [request.prompts[i] for i in index], personalization)
        seeds = jnp.asarray([request.seeds[i] for i in index], jnp.uint32)
        both = jax.tree.map(lambda n, p: jnp.stack([jnp.broadcast_to(n, p.shape), p]), negative, positive)
        noise = initial_latents(seeds, net.latent_shape)
        guided = Guided(seeds, both, jnp.float32(sampler.guidance))
        return denoise(unet, noise, guided, trajectory, networks=net, calls_per_dispatch=calls_per_dispatch), real

    return map(batch, range(0, count, size))
