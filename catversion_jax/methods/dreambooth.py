"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242).

Fine-tunes the whole UNet on prompts with a rare identifier; a second loss, on the base model's own images of the class,
preserves its prior.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from catversion_jax.base.pipeline import Networks, abstract
from catversion_jax.methods.base import TextUnchanged
from catversion_jax.methods.hyperparameters import Hyperparameters
from catversion_jax.utils import tree
from catversion_jax.utils.types import Array, Float, Key, Params

PUBLISHED = {"train.learning_rate": 5e-6, "train.batch_size": 1, "train.steps": 800, "prior.pictures": 200}
"""As in the README of diffusers' examples/dreambooth; the rate is the paper's."""


@dataclass(frozen=True)
class DreamBooth(TextUnchanged):
    """Trains `unet`, which is added to the UNet's parameters. The text encoder is not changed."""

    published = PUBLISHED
    changes_unet = True
    identifier: str
    prior_weight: float

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Hyperparameters, networks: Networks) -> "DreamBooth":
        return cls(hyperparameters.identifier, hyperparameters.prior.weight)

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        return {"unet": unet_changes(networks)}

    def unet(self, learned: Params, unet: Params, strength: Float[Array, ""] | float = 1.0) -> Params:
        return tree.add(unet, learned["unet"], strength)


def unet_changes(networks: Networks) -> Params:
    """Returns what is added to the UNet's parameters before the first step: zeros, float32."""
    # Differences, not the parameters themselves: `strength` scales them, and 0 gives exactly the base model.
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract("unet", networks.unet))
