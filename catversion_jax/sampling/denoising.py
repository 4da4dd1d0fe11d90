"""Denoising with classifier-free guidance: from noise to latents, and from latents to images."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.trajectory import Calls, Trajectory, next_state, noised
from catversion_jax.models.unet import Context
from catversion_jax.models.vae import AutoencoderKL
from catversion_jax.sampling import regions
from catversion_jax.sampling.picture_input import Kept
from catversion_jax.utils.compiler import jit
from catversion_jax.utils.types import AnyArray, Array, Bool, Float, Int, Params, UInt8, UInt32


@partial(jax.jit, static_argnums=1)
def initial_latents(seeds: UInt32[Array, "B"], shape: tuple[int, int, int]) -> Float[Array, "B h w c"]:
    """Returns the noise that sampling starts from."""
    # From each image's own seed, and not one key for the batch: an image must not depend on its neighbours.
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def step_noise(
    seeds: UInt32[Array, "B"], number: Int[AnyArray, ""] | int, shape: tuple[int, ...]
) -> Float[Array, "B h w c"]:
    """Returns fresh noise for the UNet's call `number`, from each image's own seed."""
    # The call's number is folded in, so that the split into dispatches does not change the noise.
    return jax.vmap(lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape))(seeds)


class Guided(NamedTuple):
    """Seeds, conditioning and guidance of a batch of images."""

    seeds: UInt32[Array, "B"]
    context: Context  # of each branch, [branches, B, ...]: unconditional (unless guidance is 1), conditional and, of
    # several concepts, each
    guidance: Float[Array, ""]  # the scale of classifier-free guidance; 1: none
    of_words: Float[AnyArray, "W B K"] | None = None  # of several concepts: weights of the tokens of each one's word
    kept: Kept | None = None  # of a picture that is drawn anew in parts


def predict(
    unet: Params, latents: Float[Array, "B h w c"], timestep: Float[AnyArray, ""], guided: Guided, *, networks: Networks
) -> Float[Array, "B h w c"]:
    """Returns the UNet's guided prediction; with several concepts, their branches are joined by `regions`.

    Without an unconditional branch it is the conditional prediction.
    """
    branches = len(guided.context.states)
    # All branches are one batch of the UNet.
    each = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), guided.context)
    copies = jnp.concatenate([latents] * branches)
    run = partial(networks.unet.apply, {"params": unet}, copies, jnp.full(len(copies), timestep), *each)
    if guided.of_words is None:
        out: Any = run()
        *unconditional, conditional = out.astype(jnp.float32).reshape(branches, *latents.shape)
    else:
        out, sown = run(mutable="intermediates")
        each_branch = out.astype(jnp.float32).reshape(branches, *latents.shape)
        # The branches are in the order of the context; before the concepts' is the base model's, for the whole prompt.
        at = branches - len(guided.of_words) - 1
        unconditional, base, concepts = list(each_branch[:at]), each_branch[at], each_branch[at + 1 :]
        images = len(latents)
        of_base = jax.tree.map(lambda x: x[at * images : (at + 1) * images], sown["intermediates"])
        _, height, width, _ = latents.shape
        attention = regions.attention_to_words(of_base, guided.of_words, (height, width))
        conditional = regions.join_by_region(base, concepts, regions.find_regions(attention, guided.of_words))
    if not unconditional:
        return conditional
    return unconditional[0] + guided.guidance * (conditional - unconditional[0])


@partial(jit, static_argnames=("networks",), donate_argnums=1)
def denoise_steps(
    unet: Params,
    state: Float[Array, "slots B h w c"],
    guided: Guided,
    calls: Calls,
    *,
    networks: Networks,
) -> Float[Array, "slots B h w c"]:
    """Runs the guided steps of some calls, of any scheduler. The state's buffers are donated."""

    def step(state, call: Calls):
        prediction = predict(unet, state[0], call.timestep, guided, networks=networks)
        noise = step_noise(guided.seeds, call.number, prediction.shape[1:])
        state = next_state(state, prediction, noise, call.update)
        if (kept := guided.kept) is not None:
            # What stays has at every noise level the picture's own latents (Lugmayr et al. 2022, without resampling).
            own = noised(kept.clean, kept.noise, call.to)
            state = state.at[0].set(kept.drawn * state[0] + (1 - kept.drawn) * own)
        return state, None

    # Without a loop, even of one call: see `calls_per_dispatch`.
    if len(calls.number) == 1:
        return step(state, jax.tree.map(lambda x: x[0], calls))[0]
    return jax.lax.scan(step, state, calls)[0]


def calls_per_dispatch() -> int | None:
    """Returns how many calls of the UNet one program makes here; None: all of them."""
    # XLA's CPU convolutions are slow in a loop's body (docs/performance.md).
    return 1 if jax.default_backend() == "cpu" else None


def denoise(
    unet: Params,
    state: Float[Array, "slots B h w c"],
    guided: Guided,
    trajectory: Trajectory,
    *,
    networks: Networks,
    at_once: int | None = None,
) -> Float[Array, "B h w c"]:
    """Denoises a trajectory's first state to latents, with `at_once` calls of the UNet in one program.

    By default they are `calls_per_dispatch`; their number changes the speed, not the numbers.
    """
    at_once = at_once or calls_per_dispatch() or len(trajectory.calls.number)
    for start in range(0, len(trajectory.calls.number), at_once):
        part = Calls(*(x[start : start + at_once] for x in trajectory.calls))
        state = denoise_steps(unet, state, guided, part, networks=networks)
    if (kept := guided.kept) is not None:
        # Some schedulers end at a level of a little noise, which the picture itself does not have.
        return kept.drawn * state[0] + (1 - kept.drawn) * kept.clean
    return state[0]


@partial(jit, static_argnames=("networks",))
def decode_latents(
    vae: Params, latents: Float[Array, "B h w c"], *, networks: Networks
) -> tuple[UInt8[Array, "B H W 3"], Bool[Array, ""]]:
    """Decodes latents, in the UNet's scale and dtype, to images; also returns whether all pixels were finite."""
    # In bfloat16, whose range is float32's, a pixel is off by 0.3 of 255 on average, and by 3 at most.
    net = AutoencoderKL(replace(networks.vae.config, dtype=networks.unet.config.dtype))
    images: Any = net.apply({"params": vae}, latents / net.config.scaling_factor, method="decode")
    pixels = jnp.round(jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
    return pixels, jnp.isfinite(images).all()
