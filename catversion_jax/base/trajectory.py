"""From noise to latents as data: a sequence of small matrices, one per call of the UNet.

DDIM, PLMS, Euler, Heun, LCM, UniPC and the DPM-Solver++ are linear in the latents, the UNet's predictions and fresh
noise, with coefficients that the host knows in advance. So one `next_state`, a matrix product, serves all of them: one
compiled loop without branches, whose state is one array. base/solvers.py has their formulas.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from catversion_jax.utils.types import AnyArray, Array, Float, Int


class Calls(NamedTuple):
    """The inputs of the UNet's calls, in order; a pytree to scan over."""

    number: Int[AnyArray, "calls"]
    timestep: Float[AnyArray, "calls"]
    update: Float[AnyArray, "calls slots slots+2"]  # `next_state`'s matrices
    to: Float[AnyArray, "calls"]  # the noise level that each call leads to


class Trajectory(NamedTuple):
    """From noise to latents. The state is a stack of slots: first the latents, then what the scheduler remembers."""

    scale: float  # of the initial noise, which has variance one
    sigma: float  # the noise level of the first call
    calls: Calls

    def start(
        self, noise: Float[Array, "B h w c"], clean: Float[Array, "B h w c"] | None = None
    ) -> Float[Array, "slots B h w c"]:
        """The state before the first call: noise alone, or clean latents with as much noise as the first call has."""
        slots = self.calls.update.shape[1]
        first = self.scale * noise if clean is None else noised(clean, noise, self.sigma)
        return jnp.zeros((slots, *noise.shape), noise.dtype).at[0].set(first)


def next_state(
    state: Float[Array, "slots B h w c"],
    prediction: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    update: Float[AnyArray, "slots slots+2"],
) -> Float[Array, "slots B h w c"]:
    """Returns the next state, given the UNet's prediction for the latents in the first slot."""
    terms = jnp.concatenate([state, prediction[None], noise[None]])
    return jnp.einsum("st,tBhwc->sBhwc", update, terms, precision="highest")


def signal(sigma):
    return 1 / np.hypot(1, sigma)


def noised(clean: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], sigma) -> Float[Array, "B h w c"]:
    """Returns clean latents with noise of a level, of total variance one."""
    return (clean + sigma * noise) / jnp.sqrt(1 + sigma * sigma)
