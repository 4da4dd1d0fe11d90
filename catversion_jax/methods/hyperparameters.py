"""The methods' own settings: what of the config a method is made from."""

from dataclasses import dataclass
from typing import NamedTuple

from catversion_jax.models.prefix_attention import SCOPES
from catversion_jax.utils.settings import Rule, at_least, between, one_of, setting, some_of

PARTS = ("key", "value")
"""What a prefix has at each position, in its array's order."""


def are_layers(value: tuple[int, ...]) -> bool:
    """Whether a value is some layer indices; which ones there are, the text encoder tells."""
    return bool(value) and all(isinstance(layer, int) for layer in value)


@dataclass(frozen=True)
class AdapterConfig:
    """CatVersion's prefix."""

    layers: tuple[int, ...] = setting(
        (-3, -2, -1),
        "text encoder layers; negative: from the last one that reaches the UNet",
        Rule(are_layers, "indices of layers, such as (-3, -2, -1)"),
    )
    length: int = setting(1, "P, prefix positions per layer", at_least(1))
    init_std: float = setting(1.0, "standard deviation of the prefix before training", at_least(0))
    logit_bias: float = setting(
        0.0, "added to every prefix logit; 1 in the authors' files", between(-100, 100, "a number")
    )
    scope: str = setting("all", "or trigger: only from the class word on", one_of(SCOPES))
    parts: tuple[str, ...] = setting(PARTS, "which are learned; or one of them: the other stays 0", some_of(PARTS))


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation, of dreambooth and custom_diffusion: the base model's own images of the class."""

    weight: float = setting(1.0, "of the loss on them, beside that on the photos", at_least(0, "none"))
    pictures: int = setting(200, "how many", between(1, 10_000))


class Hyperparameters(NamedTuple):
    """What the methods choose from."""

    adapter: AdapterConfig
    prior: PriorConfig
    identifier: str  # the word put before the class word
