"""The noise schedule, and what the UNet is trained to predict."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.json_config import from_json
from catversion_jax.utils.types import AnyArray, Array, Float

BETAS = {
    "scaled_linear": lambda start, end, n: np.linspace(start**0.5, end**0.5, n, dtype=np.float32) ** 2,
    "linear": lambda start, end, n: np.linspace(start, end, n, dtype=np.float32),
}
FIXED = {"rescale_betas_zero_snr": False, "trained_betas": None}


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of a model's scheduler_config.json that training needs; `sampling` is all of it, for schedulers.py."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # a key of BETAS
    prediction_type: str = "epsilon"  # a key of TARGETS
    sampling: tuple[tuple[str, Any], ...] = ()  # every key of the file and its value

    @classmethod
    def from_json(cls, json: dict) -> "NoiseSchedule":
        keys = {key: tuple(value) if isinstance(value, list) else value for key, value in json.items()}
        schedule = from_json(cls, json, FIXED, sampling=tuple(keys.items()))
        check_choices(schedule, {"beta_schedule": BETAS, "prediction_type": TARGETS})
        return schedule

    @cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, "timesteps"]:
        """The signal's share of the variance at each timestep (alpha-bar in Ho et al. 2020), float32."""
        return np.cumprod(1 - BETAS[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps))


def add_noise(
    latents: Float[AnyArray, "B h w c"], noise: Float[AnyArray, "B h w c"], alpha: Float[AnyArray, "B"]
) -> Float[Array, "B h w c"]:
    """Returns noisy latents at the timesteps whose alphas_cumprod is `alpha` (Ho et al. 2020, equation 4)."""
    alpha = alpha[:, None, None, None]
    return jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise


def velocity(latents, noise, alpha: Float[Array, "B"]) -> Float[Array, "B h w c"]:
    """The velocity v of Salimans and Ho 2022."""
    alpha = alpha[:, None, None, None]
    return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * latents


TARGETS = {"epsilon": lambda latents, noise, alpha: noise, "v_prediction": velocity}
"""prediction_type -> what the UNet predicts."""


def check_choices(config: Any, choices: Mapping[str, Collection[str]]) -> None:
    """Raises UserError for the first field of `config` whose value is not one of its choices."""
    for key, known in choices.items():
        value = getattr(config, key)
        if value not in known:
            raise UserError(f"scheduler_config.json: {key}={value!r}: expected one of {', '.join(known)}")
