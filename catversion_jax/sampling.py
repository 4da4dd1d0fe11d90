"""Pictures from prompts: text states, denoising with classifier-free guidance, decoding; a fixed batch at a time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax import schedulers, text
from catversion_jax.artifact import Concept
from catversion_jax.ensemble import ensemble
from catversion_jax.method import Method
from catversion_jax.models.unet import Context
from catversion_jax.pipeline import Networks, Pipeline
from catversion_jax.types import Array, Bool, Float, Int, Params, UInt8, UInt32


@partial(jax.jit, static_argnums=1)
def initial_latents(seeds: UInt32[Array, "B"], shape: tuple[int, int, int]) -> Float[Array, "B h w c"]:
    """Each picture's noise is a function of its own seed alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def step_noise(
    seeds: UInt32[Array, "B"], index: Int[Array, ""], shape: tuple[int, int, int]
) -> Float[Array, "B h w c"]:
    """Fresh noise for the UNet's call `index`; like the first, each picture's own."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape))(seeds)


@partial(jax.jit, static_argnames=("networks",), donate_argnums=1)
def denoise(
    unet: Params,
    state: Float[Array, "slots B h w c"],
    seeds: UInt32[Array, "B"],
    calls: schedulers.Calls,
    context: Context,
    guidance: Float[Array, ""],
    *,
    networks: Networks,
) -> Float[Array, "slots B h w c"]:
    """Guided steps of any scheduler. `context` is the unconditional and the conditional one, [2, B, ...]."""
    both = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), context)

    def step(state, call: schedulers.Calls):
        twice = jnp.concatenate([state[0], state[0]])
        timesteps = jnp.full(twice.shape[:1], call.timestep)
        out = networks.unet.apply({"params": unet}, twice, timesteps, *both).astype(jnp.float32)
        unconditional, conditional = jnp.split(out, 2)
        guided = unconditional + guidance * (conditional - unconditional)
        noise = step_noise(seeds, call.index, guided.shape[1:])
        return schedulers.step(state, guided, noise, call.update), None

    if len(calls.index) == 1:  # no loop: train_step.chunk says why
        return step(state, jax.tree.map(lambda x: x[0], calls))[0]
    return jax.lax.scan(step, state, calls)[0]


def sample_latents(
    unet: Params,
    noise: Float[Array, "B h w c"],
    seeds: UInt32[Array, "B"],
    context: Context,
    trajectory: schedulers.Trajectory,
    *,
    networks: Networks,
    guidance: float,
    calls_per_dispatch: int,
) -> Float[Array, "B h w c"]:
    """Denoise from pure noise; `guidance` is the scale of classifier-free guidance, 1 = none.

    `calls_per_dispatch` changes the speed, not the numbers.
    """
    state = trajectory.start(noise)
    for start in range(0, len(trajectory.calls.index), calls_per_dispatch):
        part = schedulers.Calls(*(x[start : start + calls_per_dispatch] for x in trajectory.calls))
        state = denoise(unet, state, seeds, part, context, jnp.float32(guidance), networks=networks)
    return state[0]


@partial(jax.jit, static_argnames=("networks",))
def decode(vae: Params, latents: Float[Array, "B h w c"], *, networks: Networks) -> UInt8[Array, "B H W 3"]:
    """Latents, scaled as the UNet knows them, to pictures."""
    net = networks.vae
    images = net.apply({"params": vae}, latents / net.config.scaling_factor, method="decode")
    return jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


@dataclass(frozen=True)
class SamplerConfig:
    """How pictures are drawn."""

    steps: int
    guidance: float
    batch_size: int  # pictures at once; the last batch is filled up, so that one program serves all
    scheduler: str = ""  # a key of schedulers.SCHEDULERS; "": the pipeline's own


@partial(jax.jit, static_argnames=("networks", "method"))
def encode(
    params: tuple[Params, ...],
    token_ids: tuple[Int[Array, "B Q"], ...],
    places: tuple[Bool[Array, "B Q 1|P"], ...],
    learned: Params,
    strength: Float[Array, ""],
    *,
    networks: Networks,
    method: Method,
) -> Context:
    """Tokens, as each text encoder takes them, to what the UNet is conditioned on."""
    of_encoders = zip(networks.text, params, token_ids, places, method.starts(networks), strict=True)
    prompts = tuple(text.lower(encoder, p, ids, seen, stop=start) for encoder, p, ids, seen, start in of_encoders)
    return method.condition(learned, prompts, params, networks, strength)


def condition(
    pipeline: Pipeline, prompts: Sequence[str], concepts: Sequence[Concept] = (), strength: float = 1.0
) -> Context:
    """Prompts to what the UNet is conditioned on, with concepts at a strength in [0, 1] or, at 0 or without concepts,
    in the base model: exactly, by the same program. So is a prompt in which no concept enters."""
    those = ensemble(concepts if strength else ())
    prompts = [those.prompt(prompt) for prompt in prompts]
    token_ids = tuple(tokenizer(prompts) for tokenizer in pipeline.tokenizers)
    places = those.places(pipeline.tokenizer, token_ids)
    touched = np.any([seen.any((1, 2)) for seen in places], axis=0)
    run = partial(encode, pipeline.params["text"], token_ids, places, networks=pipeline.networks)
    if not touched.any():
        return run({}, 0.0, method=Method())
    moved = run(those.learned, strength, method=those.method)
    if touched.all():
        return moved
    base = run({}, 0.0, method=Method())
    return jax.tree.map(lambda x, y: jnp.where(touched.reshape(-1, *[1] * (x.ndim - 1)), x, y), moved, base)


def with_unet(pipeline: Pipeline, concepts: Sequence[Concept], strength: float) -> Pipeline:
    """The pipeline with the UNet as the concepts have it."""
    if not concepts or not strength:
        return pipeline
    those = ensemble(concepts)
    unet = those.method.unet(those.learned, pipeline.params["unet"], strength)
    return replace(pipeline, params=pipeline.params | {"unet": unet})


def paint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: SamplerConfig,
    concepts: Sequence[Concept] = (),
    strength: float = 1.0,
    negative_prompt: str = "",
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """One picture for each prompt and its seed, in their order, drawn as they are asked for.

    A picture depends on its prompt and seed, not on its neighbours. The negative (or unconditional) branch never
    sees the prefix. Raises UserError at once where the scheduler cannot be had in that many steps.
    """

    def pictures(latents: Float[Array, "B h w c"]) -> UInt8[np.ndarray, "B H W 3"]:
        return np.asarray(decode(pipeline.params["vae"], latents, networks=pipeline.networks))

    batches = draw_latents(pipeline, prompts, seeds, config, concepts, strength, negative_prompt)
    return itertools.chain.from_iterable(pictures(latents)[:real] for latents, real in batches)


def draw_latents(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: SamplerConfig,
    concepts: Sequence[Concept] = (),
    strength: float = 1.0,
    negative_prompt: str = "",
) -> Iterator[tuple[Float[Array, "B h w c"], int]]:
    """The latents of `paint`'s pictures, a batch at a time, and how many of the batch are asked for."""
    net, size = pipeline.networks, config.batch_size
    trajectory = schedulers.plan(net.schedule, config.scheduler, config.steps)
    on_cpu = jax.default_backend() == "cpu"  # where a loop body's convolutions are slow
    unet = with_unet(pipeline, concepts, strength).params["unet"]
    negative = condition(pipeline, [negative_prompt])

    def batch(start: int) -> tuple[Float[Array, "B h w c"], int]:
        real = len(prompts[start : start + size])
        index = np.minimum(np.arange(start, start + size), start + real - 1)  # the last one fills up the batch
        positive = condition(pipeline, [prompts[i] for i in index], concepts, strength)
        of_batch = jnp.asarray([seeds[i] for i in index], jnp.uint32)
        latents = sample_latents(
            unet,
            initial_latents(of_batch, net.latent_shape),
            of_batch,
            jax.tree.map(lambda n, p: jnp.stack([jnp.broadcast_to(n, p.shape), p]), negative, positive),
            trajectory,
            networks=net,
            guidance=config.guidance,
            calls_per_dispatch=1 if on_cpu else len(trajectory.calls.index),
        )
        return latents, real

    return map(batch, range(0, len(prompts), size))
