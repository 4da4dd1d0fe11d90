"""A batch of pictures, drawn from random numbers of a prompt's shapes: without a tokenizer and a text encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from catversion_jax.base import schedulers
from catversion_jax.base.pipeline import Networks, abstract
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.base.trajectory import Calls, Trajectory
from catversion_jax.methods.base import BaseModel
from catversion_jax.models.unet import Context
from catversion_jax.sampling.conditioning import Tokens, encode_prompts
from catversion_jax.sampling.denoising import (
    Guided,
    calls_per_dispatch,
    decode_latents,
    denoise,
    denoise_steps,
    initial_latents,
)
from catversion_jax.utils.types import Array, Float, Params, UInt8


@dataclass(frozen=True, eq=False)  # compared by identity, not by parameters
class PictureBatch:
    """A batch of pictures of the base model, at its own size."""

    networks: Networks
    unet: Params
    vae: Params
    trajectory: Trajectory
    noise: Float[Array, "B h w c"]
    guided: Guided

    @classmethod
    def random(
        cls, networks: Networks, sampler: SamplerConfig, pictures: int, params: Mapping[str, Params]
    ) -> "PictureBatch":
        """Returns a batch of that many pictures, with the parameters of a UNet and a VAE or the shapes of these."""
        trajectory = schedulers.plan(networks.schedule, sampler.scheduler, sampler.steps)
        seeds = jnp.arange(pictures, dtype=jnp.uint32)
        noise = initial_latents(seeds, networks.latent_shape)
        rng = np.random.default_rng(0)
        branches = 1 if sampler.guidance == 1 else 2

        def random(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            return rng.standard_normal((branches, pictures, *leaf.shape[1:]), np.float32).astype(leaf.dtype)

        context = jax.tree.map(random, context_of(networks))
        guided = Guided(seeds, context, jnp.float32(sampler.guidance))
        return cls(networks, params["unet"], params["vae"], trajectory, noise, guided)

    def latents(self) -> Float[Array, "B h w c"]:
        return denoise(
            self.unet, self.trajectory.start(self.noise), self.guided, self.trajectory, networks=self.networks
        )

    def pixels(self, latents: Float[Array, "B h w c"]) -> UInt8[Array, "B H W 3"]:
        return decode_latents(self.vae, latents, networks=self.networks)[0]

    def lower(self, device: jax.Device | None = None) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Returns the program of the UNet's calls, as many as one dispatch has, and the decoder's, for a device."""
        there = device and SingleDeviceSharding(device)

        def shapes(tree):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

        calls = Calls(*(x[: calls_per_dispatch()] for x in self.trajectory.calls))
        state = jax.eval_shape(self.trajectory.start, self.noise)
        return (
            denoise_steps.lower(*shapes((self.unet, state, self.guided, calls)), networks=self.networks),
            decode_latents.lower(*shapes((self.vae, self.noise)), networks=self.networks),
        )


def context_of(networks: Networks) -> Context:
    """Returns the shapes of a prompt's conditioning."""
    text = tuple(abstract("text", encoder, encoder.config.dtype) for encoder in networks.text)
    length = [(1, encoder.config.max_position_embeddings) for encoder in networks.text]
    tokens = tuple(Tokens(np.zeros(shape, np.int32), np.zeros((*shape, 1), bool)) for shape in length)
    encode = partial(encode_prompts, networks=networks, method=BaseModel())
    return jax.eval_shape(encode, text, tokens, {}, jnp.float32(0))


def picture_shapes(networks: Networks) -> dict[str, Params]:
    """Returns the shapes of the parameters that a batch takes, in the dtypes that they are loaded in."""
    return {
        name: abstract(name, network, network.config.dtype)
        for name, network in (("unet", networks.unet), ("vae", networks.vae))
    }


def count_pictures(networks: Networks, sampler: SamplerConfig, pictures: int) -> tuple[int, float, float]:
    """Returns the calls of the UNet, and the FLOPs of one and of the decoder, as `step.count_flops` those of a step."""
    jax.config.update("jax_platforms", "cpu")
    batch = PictureBatch.random(networks, sampler, pictures, picture_shapes(networks))
    counts: Any = [lowered.cost_analysis() for lowered in batch.lower()]
    return len(batch.trajectory.calls.number), counts[0]["flops"], counts[1]["flops"]
