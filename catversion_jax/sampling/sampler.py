"""Images from prompts: text states, denoising with classifier-free guidance, decoding; a fixed batch at a time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base import schedulers, text
from catversion_jax.base.pipeline import Networks, Pipeline
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.base import BaseModel, Method
from catversion_jax.methods.composition import BASE_MODEL, Personalization
from catversion_jax.models.unet import Context
from catversion_jax.utils.types import Array, Bool, Float, Int, Params, UInt8, UInt32


@partial(jax.jit, static_argnums=1)
def initial_latents(seeds: UInt32[Array, "B"], shape: tuple[int, int, int]) -> Float[Array, "B h w c"]:
    """Each picture's noise is a function of its own seed alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def step_noise(
    seeds: UInt32[Array, "B"], index: Int[Array, ""], shape: tuple[int, int, int]
) -> Float[Array, "B h w c"]:
    """Fresh noise for the UNet's call `index`; like the first, each picture's own."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape))(seeds)


class Guided(NamedTuple):
    """What the images of a batch are sampled from."""

    seeds: UInt32[Array, "B"]
    context: Context  # the unconditional and the conditional one, [2, B, ...]
    guidance: Float[Array, ""]  # the scale of classifier-free guidance; 1: none


@partial(jax.jit, static_argnames=("networks",), donate_argnums=1)
def denoise_steps(
    unet: Params,
    state: Float[Array, "slots B h w c"],
    guided: Guided,
    calls: schedulers.Calls,
    *,
    networks: Networks,
) -> Float[Array, "slots B h w c"]:
    """Guided steps of any scheduler."""
    both = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), guided.context)

    def step(state, call: schedulers.Calls):
        twice = jnp.concatenate([state[0], state[0]])
        timesteps = jnp.full(twice.shape[:1], call.timestep)
        out = networks.unet.apply({"params": unet}, twice, timesteps, *both).astype(jnp.float32)
        unconditional, conditional = jnp.split(out, 2)
        prediction = unconditional + guided.guidance * (conditional - unconditional)
        noise = step_noise(guided.seeds, call.index, prediction.shape[1:])
        return schedulers.step(state, prediction, noise, call.update), None

    if len(calls.index) == 1:  # no loop: train_step.chunk says why
        return step(state, jax.tree.map(lambda x: x[0], calls))[0]
    return jax.lax.scan(step, state, calls)[0]


def denoise(
    unet: Params,
    noise: Float[Array, "B h w c"],
    guided: Guided,
    trajectory: schedulers.Trajectory,
    *,
    networks: Networks,
    calls_per_dispatch: int,
) -> Float[Array, "B h w c"]:
    """From pure noise to latents. `calls_per_dispatch` changes the speed, not the numbers."""
    state = trajectory.start(noise)
    for start in range(0, len(trajectory.calls.index), calls_per_dispatch):
        part = schedulers.Calls(*(x[start : start + calls_per_dispatch] for x in trajectory.calls))
        state = denoise_steps(unet, state, guided, part, networks=networks)
    return state[0]


@partial(jax.jit, static_argnames=("networks",))
def decode(vae: Params, latents: Float[Array, "B h w c"], *, networks: Networks) -> UInt8[Array, "B H W 3"]:
    """Latents, scaled as the UNet knows them, to pictures."""
    net = networks.vae
    images = net.apply({"params": vae}, latents / net.config.scaling_factor, method="decode")
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


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


class Tokens(NamedTuple):
    """Prompts as a text encoder takes them."""

    ids: Int[Array, "B Q"]
    mask: Bool[Array, "B Q #P"]  # where what is learned enters


@partial(jax.jit, static_argnames=("networks", "method"))
def encode(
    params: tuple[Params, ...],
    tokens: tuple[Tokens, ...],
    learned: Params,
    strength: Float[Array, ""],
    *,
    networks: Networks,
    method: Method,
) -> Context:
    """Tokens, as each text encoder takes them, to what the UNet is conditioned on."""
    of_encoders = zip(networks.text, params, tokens, method.first_layers(networks), strict=True)
    prompts = tuple(text.lower(encoder, p, *of_encoder, stop=first) for encoder, p, of_encoder, first in of_encoders)
    return method.condition(learned, prompts, params, networks, strength)


def condition(pipeline: Pipeline, prompts: Sequence[str], personalization: Personalization = BASE_MODEL) -> Context:
    """Prompts to what the UNet is conditioned on. In the base model, and for a prompt in which no concept enters, that
    is exactly the base model's, by the same program."""
    those = personalization.composition
    prompts = [those.prompt(prompt) for prompt in prompts]
    token_ids = tuple(tokenizer(prompts) for tokenizer in pipeline.tokenizers)
    masks = those.token_masks(pipeline.tokenizer, token_ids)
    touched = np.any([mask.any((1, 2)) for mask in masks], axis=0)
    tokens = tuple(map(Tokens, token_ids, masks))
    run = partial(encode, pipeline.params["text"], tokens, networks=pipeline.networks)
    if not touched.any():
        return run({}, 0.0, method=BaseModel())
    moved = run(those.learned, personalization.strength, method=those.method)
    if touched.all():
        return moved
    base = run({}, 0.0, method=BaseModel())
    return jax.tree.map(lambda x, y: jnp.where(touched.reshape(-1, *[1] * (x.ndim - 1)), x, y), moved, base)


def with_unet(pipeline: Pipeline, personalization: Personalization) -> Pipeline:
    """The pipeline with the UNet as the concepts have it."""
    those = personalization.composition
    if not those.method.changes_unet:
        return pipeline
    unet = those.method.unet(those.learned, pipeline.params["unet"], personalization.strength)
    return replace(pipeline, params=pipeline.params | {"unet": unet})


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
