"""What the methods that train the UNet share: prompts with an identifier, and images of the class as a prior."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from catversion_jax.base.pipeline import Networks, abstract
from catversion_jax.methods.base import Method
from catversion_jax.methods.hyperparameters import Hyperparameters
from catversion_jax.utils import tree
from catversion_jax.utils.types import Array, Float, Params


@dataclass(frozen=True)
class UNetMethod(Method):
    """Trains `unet`: changes that are added to some of the UNet's parameters."""

    changes_unet = True
    identifier: str
    prior_weight: float

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Hyperparameters, networks: Networks) -> "UNetMethod":
        return cls(hyperparameters.identifier, hyperparameters.prior.weight)

    def unet(self, learned: Params, unet: Params, strength: Float[Array, ""] | float = 1.0) -> Params:
        return tree.add(unet, learned["unet"], strength)


def unet_changes(networks: Networks) -> Params:
    """Returns what is added to the UNet's parameters before the first step: zeros, float32."""
    # Differences, not the parameters themselves: `strength` scales them, and 0 gives exactly the base model.
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract("unet", networks.unet))
