"""The methods' published settings on published models, from which the files in configs/ start."""

from ml_collections import ConfigDict

from catversion_jax.config.config import default
from catversion_jax.methods.registry import METHODS
from catversion_jax.utils.errors import UserError

JUDGED = (
    "a photo of {concept} on the beach",
    "a photo of {concept} in the snow",
    "a photo of {concept} in the jungle",
    "a photo of {concept} on a wooden floor",
    "a photo of {concept} at night",
    "a photo of {concept} with a city in the background",
    "a photo of a blue {class_word}",
    "a photo of {concept} wearing a hat",
)
"""Default evaluation prompts: places, a colour and an accessory."""


PROMPTS = (
    "a photo of {concept}",
    "a picture of {concept}",
    "a photo of one {class_word}",
    "{concept}",
    "{class_word}",
)
"""Training prompts of CatVersion: one thing said in several ways, so that less of one wording is learned with it."""


def stable_diffusion(path: str, variant: str = "fp16", method: str = "catversion") -> ConfigDict:
    """Returns a method's published settings for a published model, in bfloat16 and with the evaluation prompts."""
    if method not in METHODS:
        raise UserError(f"{method}: no such method; expected one of {', '.join(METHODS)}")
    config = default()
    config.method = method
    if method == "catversion":
        config.concept.templates = PROMPTS
    config.update_from_flattened_dict(METHODS[method].published)
    config.model.path = path
    config.model.variant = variant
    config.model.dtype = "bfloat16"
    config.sample.prompts = JUDGED
    return config
