"""CatVersion in JAX: concatenated embeddings for diffusion-based text-to-image personalization.

    import catversion_jax as cv

    pipe = cv.Pipeline.from_pretrained()
    mug = cv.learn(pipe, "photos", class_word="mug")
    images = pipe("a photo of a mug on the beach", concepts=[mug])

docs/api.md says more.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from catversion_jax.api.learning import learn, learn_many
    from catversion_jax.api.pipeline import Pipeline
    from catversion_jax.config.shipped import load_config
    from catversion_jax.methods.concept_file import Concept
    from catversion_jax.sampling.picture_record import png_info
    from catversion_jax.utils.errors import StorageError, UserError

__version__ = "0.1.0"
__all__ = [
    "Concept",
    "Pipeline",
    "StorageError",
    "UserError",
    "__version__",
    "learn",
    "learn_many",
    "load_config",
    "png_info",
]

HOMES = {
    "Concept": "methods.concept_file",
    "Pipeline": "api.pipeline",
    "StorageError": "utils.errors",
    "UserError": "utils.errors",
    "learn": "api.learning",
    "learn_many": "api.learning",
    "load_config": "config.shipped",
    "png_info": "sampling.picture_record",
}
"""Each name, and the module that has it: imported when it is asked for, as JAX and Flax take seconds."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
