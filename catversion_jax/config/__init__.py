"""Settings: `Config`, and what a file in configs/ is made of."""

from catversion_jax.config.config import Config, default, from_config_dict, to_config_dict
from catversion_jax.config.published import JUDGED, stable_diffusion

__all__ = ["JUDGED", "Config", "default", "from_config_dict", "stable_diffusion", "to_config_dict"]
