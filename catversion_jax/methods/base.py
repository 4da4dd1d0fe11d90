"""The interface of every method: what a concept is learned as, and where that enters the base model."""

import abc
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import jax
import numpy as np

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.text_states import PromptStates, upper_layers
from catversion_jax.base.tokenizer import put_before
from catversion_jax.methods.hyperparameters import Hyperparameters
from catversion_jax.models.prefix_attention import Prefix
from catversion_jax.models.unet import Context
from catversion_jax.utils.types import Array, Bool, Float, Int, Key, Params


@dataclass(frozen=True)
class Method(abc.ABC):
    """A way to learn a concept: what is learned, and where it enters the base model.

    A method is static and hashable. What is learned is a dict, or nested dicts, of float32 arrays. `strength` in [0, 1]
    scales what it does; at 0 the base model is left, exactly.
    """

    published: ClassVar[dict[str, Any]] = {}  # hyperparameters that differ from the config's defaults
    changes_unet: ClassVar[bool] = False  # then concepts cannot share a step
    identifier: ClassVar[str] = ""  # a word that stands before the class word in every prompt; "": none
    prior_weight: ClassVar[float] = 0.0  # of the loss on the base model's own images of the class; 0: there are none

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Hyperparameters, networks: Networks) -> "Method":
        """The method as the config has it. Raises UserError for what the networks have no room for."""
        return cls()

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], learned: Params) -> "Method":
        """The method as a concept's file has it. Raises ValueError for metadata and arrays of no such concept."""
        check_keys(metadata, {field.name for field in fields(cls)})
        return cls(**metadata)

    def metadata(self) -> dict[str, Any]:
        """What a concept's file has to tell, in JSON's types."""
        return asdict(self)

    @abc.abstractmethod
    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        """What is learned, before the first step."""

    @abc.abstractmethod
    def first_layers(self, networks: Networks) -> tuple[int, ...]:
        """Of each text encoder, the first layer that what is learned reaches."""

    @abc.abstractmethod
    def token_mask(self, token_ids: Int[np.ndarray, "T Q"], word: tuple[int, ...]) -> Bool[np.ndarray, "T Q 1"]:
        """The token positions where what is learned enters; `word` is the identifier or, without one, the class
        word."""

    @abc.abstractmethod
    def apply_to_prompts(
        self, learned: Params, prompts: tuple[PromptStates, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[PromptStates, ...], Sequence[Prefix | None]]:
        """The prompts of each text encoder with what is learned in them, and its prefix."""

    def misfit(self, learned: Params, networks: Networks) -> str | None:
        """What of the learned arrays the networks have no room for, if anything."""
        expected = jax.eval_shape(lambda: self.init(jax.random.key(0), networks))
        found, expected = (jax.tree.map(np.shape, tree) for tree in (learned, expected))
        return None if found == expected else "arrays of other names or shapes than those of its networks"

    def prompt(self, prompt: str, class_word: str) -> str:
        """A prompt as the text encoder is given it."""
        return put_before(prompt, class_word, self.identifier) if self.identifier else prompt

    def condition(
        self,
        learned: Params,
        prompts: tuple[PromptStates, ...],
        text_params: tuple[Params, ...],
        networks: Networks,
        strength: Float[Array, ""] | float = 1.0,
    ) -> Context:
        """What the UNet is conditioned on, from the states below `first_layers`."""
        changed, prefixes = self.apply_to_prompts(learned, prompts, strength)
        return upper_layers(networks.text, text_params, changed, prefixes, self.first_layers(networks))

    def unet(self, learned: Params, unet: Params, strength: Float[Array, ""] | float = 1.0) -> Params:
        """The UNet's parameters."""
        return unet


@dataclass(frozen=True)
class TextUnchanged(Method):
    """A method that leaves the text encoders as they are."""

    def first_layers(self, networks: Networks) -> tuple[int, ...]:
        return tuple(encoder.config.depth for encoder in networks.text)

    def token_mask(self, token_ids: Int[np.ndarray, "T Q"], word: tuple[int, ...]) -> Bool[np.ndarray, "T Q 1"]:
        return np.zeros((*token_ids.shape, 1), bool)

    def apply_to_prompts(
        self, learned: Params, prompts: tuple[PromptStates, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[PromptStates, ...], Sequence[Prefix | None]]:
        return prompts, (None,) * len(prompts)


@dataclass(frozen=True)
class BaseModel(TextUnchanged):
    """The base model itself: nothing is learned."""

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        return {}


def check_keys(metadata: Mapping[str, Any], required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raises ValueError for metadata that lacks a key or has one more."""
    if odd := sorted((metadata.keys() ^ required) - optional):
        raise ValueError(f"metadata missing or unknown: {', '.join(odd)}")


def of_encoders(name: str, count: int) -> tuple[str, ...]:
    """What an array of each of `count` text encoders is called: `name` and, in SDXL, `name`_2."""
    return (name, f"{name}_2")[:count]
