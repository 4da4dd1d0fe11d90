"""What a concept is learned as, and where that enters the base model: the interface of CatVersion and its rivals."""

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from catversion_jax import text
from catversion_jax.adapter import Prefix
from catversion_jax.models.unet import Context
from catversion_jax.pipeline import Networks
from catversion_jax.types import Array, Bool, Float, Int, Key, Params


@dataclass(frozen=True)
class Method:
    """The base model itself, in which nothing is learned: what a method inherits where it does not say otherwise.

    A method is static and hashable. What is learned is a dict, or nested dicts, of float32 arrays. `strength` in [0, 1]
    scales what it does; at 0 the base model is left, exactly.
    """

    published: ClassVar[dict[str, Any]] = {}  # hyperparameters: what differs from `config.default`
    changes_unet: ClassVar[bool] = False  # then concepts cannot share a step
    identifier: ClassVar[str] = ""  # a word that stands before the class word in every prompt; "": none
    prior_weight: ClassVar[float] = 0.0  # of the loss on the base model's own pictures of the class; 0: there are none

    @classmethod
    def from_config(cls, config: ConfigDict, networks: Networks) -> "Method":
        """As `config` has it. Raises UserError for what the networks have no place for."""
        return cls()

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], learned: Params) -> "Method":
        """As a concept's file has it. Raises ValueError for metadata and arrays that are no such concept's."""
        check_keys(metadata, {field.name for field in fields(cls)})
        return cls(**metadata)

    def metadata(self) -> dict[str, Any]:
        """What a concept's file has to tell, in JSON's types."""
        return asdict(self)

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        """What is learned, before the first step."""
        return {}

    def misfit(self, learned: Params, networks: Networks) -> str | None:
        """What of the learned arrays the networks have no place for, if anything."""
        expected = jax.eval_shape(lambda: self.init(jax.random.key(0), networks))
        found, expected = (jax.tree.map(np.shape, tree) for tree in (learned, expected))
        return None if found == expected else "arrays of other names or shapes than those of its networks"

    def prompt(self, prompt: str, class_word: str) -> str:
        """A prompt as the text encoder is given it."""
        return text.put_before(prompt, class_word, self.identifier) if self.identifier else prompt

    def starts(self, networks: Networks) -> tuple[int, ...]:
        """Of each text encoder, the first layer that what is learned reaches."""
        return tuple(encoder.config.depth for encoder in networks.text)

    def places(self, token_ids: Int[np.ndarray, "T Q"], word: tuple[int, ...]) -> Bool[np.ndarray, "T Q 1"]:
        """The token positions where what is learned enters; `word` is the identifier or, without one, the class
        word."""
        return np.zeros((*token_ids.shape, 1), bool)

    def enter(
        self, learned: Params, prompts: tuple[text.Prompts, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[text.Prompts, ...], Sequence[Prefix | None]]:
        """The prompts of each text encoder with what is learned in them, and its prefix."""
        return prompts, (None,) * len(prompts)

    def condition(
        self,
        learned: Params,
        prompts: tuple[text.Prompts, ...],
        text_params: tuple[Params, ...],
        networks: Networks,
        strength: Float[Array, ""] | float = 1.0,
    ) -> Context:
        """What the UNet is conditioned on, from the states below `starts`."""
        changed, prefixes = self.enter(learned, prompts, strength)
        return text.upper(networks.text, text_params, changed, prefixes, self.starts(networks))

    def unet(self, learned: Params, unet: Params, strength: Float[Array, ""] | float = 1.0) -> Params:
        """The UNet's parameters."""
        return unet


def check_keys(metadata: dict[str, Any], required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raise ValueError for metadata that lacks a key or has one more."""
    if odd := sorted((metadata.keys() ^ required) - optional):
        raise ValueError(f"metadata missing or unknown: {', '.join(odd)}")


def of_encoders(name: str, count: int) -> tuple[str, ...]:
    """What an array of each of `count` text encoders is called: `name` and, in SDXL, `name`_2."""
    return (name, f"{name}_2")[:count]
