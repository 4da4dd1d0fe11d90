"""The methods' own settings: the part of the config that a method is built from."""

from dataclasses import dataclass
from typing import NamedTuple

from catversion_jax.models.prefix_attention import SCOPES
from catversion_jax.utils.settings import Constraint, at_least, between, one_of, setting, some_of

PARTS = ("key", "value")
"""What a prefix has at each position, in the order of its array's axis of size 2."""


def are_layers(value: tuple[int, ...]) -> bool:
    """Whether a value is a non-empty tuple of layer indices; their range depends on the text encoder."""
    return bool(value) and all(isinstance(layer, int) for layer in value)


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of CatVersion's prefix."""

    layers: tuple[int, ...] = setting(
        (-3, -2, -1),
        "Text encoder layers with a prefix; negative indices count from the last layer that reaches the UNet.",
        Constraint(are_layers, "indices of layers, such as (-3, -2, -1)"),
    )
    length: int = setting(1, "Prefix length P: number of learned positions per layer.", at_least(1))
    init_std: float = setting(1.0, "Standard deviation of the prefix before training.", at_least(0))
    logit_bias: float = setting(
        0.0,
        "Value added to every attention logit of the prefix; 1 in the authors' code.",
        between(-100, 100),
    )
    scope: str = setting(
        "all", "Tokens that see the prefix: all, or trigger for those from the class word on.", one_of(SCOPES)
    )
    parts: tuple[str, ...] = setting(
        PARTS, "Parts of the prefix that are learned: key, value or both; the other part stays 0.", some_of(PARTS)
    )


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation in dreambooth and custom_diffusion, by the base model's own images of the class."""

    weight: float = setting(
        1.0,
        "Loss weight of the class images in dreambooth and custom_diffusion; 0 means none are used.",
        at_least(0, "none"),
    )
    pictures: int = setting(
        200,
        "Number of class images that the base model samples for dreambooth and custom_diffusion.",
        between(1, 10_000),
    )


class Hyperparameters(NamedTuple):
    """The settings that methods are built from; each method uses its own part."""

    adapter: AdapterConfig
    prior: PriorConfig
    identifier: str  # the word put before the class word
