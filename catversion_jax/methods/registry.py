"""CatVersion and its baselines, by their names in `config.method` and in concept files."""

from catversion_jax.methods.base import Method
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.methods.custom_diffusion import CustomDiffusion
from catversion_jax.methods.dreambooth import DreamBooth
from catversion_jax.methods.textual_inversion import TextualInversion

METHODS: dict[str, type[Method]] = {
    "catversion": CatVersion,
    "textual_inversion": TextualInversion,
    "dreambooth": DreamBooth,
    "custom_diffusion": CustomDiffusion,
}


def name_of(method: Method) -> str:
    return next(name for name, of_name in METHODS.items() if type(method) is of_name)
