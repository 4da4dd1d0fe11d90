"""The noise schedule, and what the UNet is trained to predict."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.json_config import from_json, not_in_file
from catversion_jax.utils.types import AnyArray, Array, Float

BETAS = {
    "scaled_linear": lambda start, end, n: np.linspace(start**0.5, end**0.5, n, dtype=np.float32) ** 2,
    "linear": lambda start, end, n: np.linspace(start, end, n, dtype=np.float32),
}
FIXED = {"trained_betas": None}
Beta = Annotated[float, Meta(gt=0, lt=1)]


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of a model's scheduler_config.json that training needs; `sampling` is all of it, for schedulers.py."""

    num_train_timesteps: Annotated[int, Meta(ge=2, le=100_000)] = 1000
    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    beta_schedule: str = "scaled_linear"  # a key of BETAS
    prediction_type: str = "epsilon"  # a key of TARGETS
    rescale_betas_zero_snr: bool = False  # the last timestep has no signal (Lin et al. 2024)
    sampling: tuple[tuple[str, Any], ...] = not_in_file(())  # every key of the file and its value

    @classmethod
    def from_json(cls, json: dict) -> "NoiseSchedule":
        schedule = from_json(cls, json, FIXED, sampling=as_tuples(json))
        check_choices(schedule, {"beta_schedule": BETAS, "prediction_type": TARGETS})
        if schedule.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
            raise UserError(
                "scheduler_config.json: rescale_betas_zero_snr=True: expected prediction_type v_prediction, because "
                "from a timestep without signal no noise can be predicted; set config.model.prediction_type"
            )
        if not schedule.rescale_betas_zero_snr and not schedule.alphas_cumprod[-1] > 0:
            raise UserError(f"scheduler_config.json: beta_end={schedule.beta_end}: leaves no signal; expected 0.012")
        return schedule

    @cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, "timesteps"]:
        """The signal's share of the variance at each timestep (alpha-bar in Ho et al. 2020), float32."""
        alphas = np.cumprod(1 - BETAS[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps))
        return zero_terminal_snr(alphas) if self.rescale_betas_zero_snr else alphas


def zero_terminal_snr(alphas_cumprod: Float[np.ndarray, "timesteps"]) -> Float[np.ndarray, "timesteps"]:
    """Shifts and scales the signal so that the first timestep keeps it and the last one has none.

    Lin et al. 2024, algorithm 1; float32.
    """
    signal = np.sqrt(alphas_cumprod)
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2


def as_tuples(value: Any) -> Any:
    """Returns parsed JSON with tuples for its lists and objects, which jit's static arguments may hold."""
    if isinstance(value, dict):
        return tuple((key, as_tuples(entry)) for key, entry in value.items())
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


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
