"""The noise schedule, what the UNet is trained to predict, and the DDIM update (Song et al. 2021)."""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from catversion_jax.models.config import from_json
from catversion_jax.types import Array, Float

BETAS = {
    "scaled_linear": lambda start, end, n: np.linspace(start**0.5, end**0.5, n, dtype=np.float32) ** 2,
    "linear": lambda start, end, n: np.linspace(start, end, n, dtype=np.float32),
}
FIXED = {"rescale_betas_zero_snr": False, "thresholding": False, "trained_betas": None, "clip_sample": False}


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of a pipeline's scheduler_config.json that training and DDIM need."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"  # a key of TARGETS
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    @classmethod
    def from_json(cls, json: dict) -> "NoiseSchedule":
        return from_json(cls, json, FIXED)

    @cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, "timesteps"]:
        """The signal's share of the variance at each timestep, float32."""
        return np.cumprod(1 - BETAS[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps))

    def ddim_timesteps(self, steps: int) -> np.ndarray:
        """`steps` timesteps in descending order, spaced as diffusers' "leading"."""
        stride = self.num_train_timesteps // steps
        return (np.arange(steps) * stride)[::-1] + self.steps_offset

    def ddim_alphas(self, steps: int) -> tuple[Float[np.ndarray, "steps"], Float[np.ndarray, "steps"]]:
        """alphas_cumprod at each timestep of `ddim_timesteps`, and at the one that each step goes to."""
        timesteps = self.ddim_timesteps(steps)
        previous = timesteps - self.num_train_timesteps // steps
        final = np.float32(1) if self.set_alpha_to_one else self.alphas_cumprod[0]
        return self.alphas_cumprod[timesteps], np.where(previous >= 0, self.alphas_cumprod[previous], final)


def add_noise(
    latents: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], alpha: Float[Array, "B"]
) -> Float[Array, "B h w c"]:
    """Noisy latents at the timesteps where alphas_cumprod is `alpha`."""
    alpha = alpha[:, None, None, None]
    return jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise


def velocity(latents, noise, alpha: Float[Array, "B"]) -> Float[Array, "B h w c"]:
    """v of Salimans and Ho 2022."""
    alpha = alpha[:, None, None, None]
    return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * latents


TARGETS = {"epsilon": lambda latents, noise, alpha: noise, "v_prediction": velocity}
"""prediction_type -> what the UNet predicts."""


def to_epsilon_and_clean(prediction, noisy, alpha: Float[Array, ""], prediction_type: str):
    """The noise and the clean latents that a prediction stands for."""
    signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if prediction_type == "v_prediction":
        return signal * prediction + sigma * noisy, signal * noisy - sigma * prediction
    return prediction, (noisy - sigma * prediction) / signal


def ddim_update(
    prediction: Float[Array, "B h w c"],
    noisy: Float[Array, "B h w c"],
    alpha: Float[Array, ""],
    alpha_previous: Float[Array, ""],
    prediction_type: str,
) -> Float[Array, "B h w c"]:
    """One deterministic DDIM step (eta 0)."""
    epsilon, clean = to_epsilon_and_clean(prediction, noisy, alpha, prediction_type)
    return jnp.sqrt(alpha_previous) * clean + jnp.sqrt(1 - alpha_previous) * epsilon
