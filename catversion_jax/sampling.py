"""Pictures from prompts: text states, DDIM with classifier-free guidance, decoding; a fixed batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax import diffusion, text
from catversion_jax.adapter import Prefix, strength_bias
from catversion_jax.artifact import Concept
from catversion_jax.pipeline import Networks, Pipeline
from catversion_jax.types import Array, Float, Int, Params, UInt8, UInt32


@partial(jax.jit, static_argnums=1)
def initial_latents(seeds: UInt32[Array, "B"], shape: tuple[int, int, int]) -> Float[Array, "B h w c"]:
    """Each picture's noise is a function of its own seed alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@partial(jax.jit, static_argnames=("networks",), donate_argnums=1)
def denoise(
    unet: Params,
    latents: Float[Array, "B h w c"],
    trajectory: tuple[Array, Array, Array],
    context: Float[Array, "2 B Q c"],
    guidance: Float[Array, ""],
    *,
    networks: Networks,
) -> Float[Array, "B h w c"]:
    """Guided DDIM steps. `trajectory` is (timesteps, alpha, alpha at the next step), each [steps];
    `context` the unconditional and the conditional text states."""
    prediction_type = networks.schedule.prediction_type
    both = context.reshape(-1, *context.shape[2:])

    def step(latents, xs):
        timestep, alpha, alpha_previous = xs
        twice = jnp.concatenate([latents, latents])
        timesteps = jnp.full(twice.shape[:1], timestep)
        out = networks.unet.apply({"params": unet}, twice, timesteps, both).astype(jnp.float32)
        unconditional, conditional = jnp.split(out, 2)
        guided = unconditional + guidance * (conditional - unconditional)
        return diffusion.ddim_update(guided, latents, alpha, alpha_previous, prediction_type), None

    return jax.lax.scan(step, latents, trajectory, unroll=len(trajectory[0]) == 1)[0]


def sample_latents(
    unet: Params,
    latents: Float[Array, "B h w c"],
    context: Float[Array, "2 B Q c"],
    *,
    networks: Networks,
    steps: int,
    guidance: float,
    steps_per_dispatch: int,
) -> Float[Array, "B h w c"]:
    """Denoise from pure noise; `guidance` is the scale of classifier-free guidance, 1 = none.

    `steps_per_dispatch` changes the speed, not the numbers.
    """
    schedule = networks.schedule
    trajectory = (schedule.ddim_timesteps(steps).astype(np.int32), *schedule.ddim_alphas(steps))
    for start in range(0, steps, steps_per_dispatch):
        part = tuple(x[start : start + steps_per_dispatch] for x in trajectory)
        latents = denoise(unet, latents, part, context, jnp.float32(guidance), networks=networks)
    return latents


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


@partial(jax.jit, static_argnames=("networks",))
def encode(
    params: Params, token_ids: Int[Array, "B Q"], prefix: Prefix | None, *, networks: Networks
) -> Float[Array, "B Q c"]:
    """Prompts to the text states the UNet is conditioned on; without a prefix, those of the base model."""
    return networks.text.apply({"params": params}, token_ids, prefix)["last_hidden_state"]


def concept_prefix(
    concept: Concept, strength: float, token_ids: Int[np.ndarray, "B Q"], tokenizer: text.Tokenizer
) -> Prefix:
    """A concept as the text encoder's hook takes it, at a strength in [0, 1] (0: the base model, exactly)."""
    visible = text.visibility(token_ids, tokenizer.word(concept.class_word), concept.scope)
    bias = jnp.float32(strength_bias(concept.logit_bias, strength))
    return Prefix(jnp.asarray(concept.prefix), bias, jnp.asarray(visible[..., None]), concept.layers)


def paint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: SamplerConfig,
    concept: Concept | None = None,
    strength: float = 1.0,
    negative_prompt: str = "",
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """One picture for each prompt and its seed, in their order.

    A picture depends on its prompt and seed, not on its neighbours. The negative (or unconditional) branch never
    sees the prefix.
    """
    net, params = pipeline.networks, pipeline.params
    on_cpu = jax.default_backend() == "cpu"  # where a loop body's convolutions are slow
    negative = encode(params["text"], pipeline.tokenizer([negative_prompt]), None, networks=net)
    size = config.batch_size
    for start in range(0, len(prompts), size):
        real = len(prompts[start : start + size])
        index = np.minimum(np.arange(start, start + size), start + real - 1)  # the last one fills up the batch
        token_ids = pipeline.tokenizer([prompts[i] for i in index])
        prefix = concept and concept_prefix(concept, strength, token_ids, pipeline.tokenizer)
        positive = encode(params["text"], token_ids, prefix, networks=net)
        latents = sample_latents(
            params["unet"],
            initial_latents(jnp.asarray([seeds[i] for i in index], jnp.uint32), net.latent_shape),
            jnp.stack([jnp.broadcast_to(negative, positive.shape), positive]),
            networks=net,
            steps=config.steps,
            guidance=config.guidance,
            steps_per_dispatch=1 if on_cpu else config.steps,
        )
        yield from np.asarray(decode(params["vae"], latents, networks=net))[:real]
