"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242).

Fine-tunes the whole UNet on prompts with a rare identifier; a second loss, on the base model's own images of the class,
preserves its prior.
"""

from dataclasses import dataclass

from catversion_jax.base.pipeline import Networks
from catversion_jax.methods.base import TextUnchanged
from catversion_jax.methods.unet_method import UNetMethod, unet_changes
from catversion_jax.utils.types import Array, Key, Params

PUBLISHED = {"train.learning_rate": 5e-6, "train.batch_size": 1, "train.steps": 800, "prior.pictures": 200}
"""As in the README of diffusers' examples/dreambooth; the rate is the paper's."""


@dataclass(frozen=True)
class DreamBooth(TextUnchanged, UNetMethod):
    """Trains all of the UNet's parameters. The text encoders are not changed."""

    published = PUBLISHED

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        return {"unet": unet_changes(networks)}
