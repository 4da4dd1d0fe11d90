"""The settings of a run: `Config`, and the functions that the files in configs/ build on."""

from catversion_jax.config.config import OF_A_RUN, Config, default, from_config_dict, to_config_dict
from catversion_jax.config.published import JUDGED, PROMPTS, stable_diffusion
from catversion_jax.config.shipped import load_config

__all__ = [
    "JUDGED",
    "OF_A_RUN",
    "PROMPTS",
    "Config",
    "default",
    "from_config_dict",
    "load_config",
    "stable_diffusion",
    "to_config_dict",
]
