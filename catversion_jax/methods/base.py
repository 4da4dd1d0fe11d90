"""The interface of all methods: what is trained for a concept, and where it enters the base model."""

import abc
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import jax
import msgspec
import numpy as np

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.text_states import PromptStates, upper_layers
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import put_before
from catversion_jax.methods.hyperparameters import Hyperparameters
from catversion_jax.models.prefix_attention import Prefix
from catversion_jax.models.unet import Context
from catversion_jax.utils.types import Array, Bool, Float, Int, Key, Params


@dataclass(frozen=True)
class Method(abc.ABC):
    """A method: which parameters are trained for a concept, and where they enter the base model.

    A method is static and hashable. The learned parameters are a dict, or nested dicts, of float32 arrays. `strength`
    scales their effect: 0 gives exactly the base model, 1 is as trained, and more exaggerates it.
    """

    published: ClassVar[dict[str, Any]] = {}  # hyperparameters that differ from the config's defaults
    changes_unet: ClassVar[bool] = False  # if so, concepts cannot share a training step
    # Not annotated, so they are not fields here; a method that uses them declares them as fields.
    identifier = ""  # the word put before the class word in every prompt; "": none
    vectors = 0  # token embeddings that stand in the place of the class word
    prior_weight = 0.0  # loss weight of the base model's own images of the class; 0: none are used

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Hyperparameters, networks: Networks) -> "Method":
        """Builds the method from the config. Raises UserError if it does not fit the networks."""
        return cls()

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], learned: Params) -> "Method":
        """Builds the method from a concept's file. Raises ValueError if metadata or arrays are not this method's."""
        check_keys(metadata, {field.name for field in fields(cls)})
        return msgspec.convert(metadata, cls)

    def metadata(self) -> dict[str, Any]:
        """The method's fields for a concept's file, in JSON's types."""
        return asdict(self)

    @abc.abstractmethod
    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        """Returns the learned parameters before the first step."""

    @abc.abstractmethod
    def first_layers(self, networks: Networks) -> tuple[int, ...]:
        """The first layer of each text encoder that the learned parameters reach."""

    @abc.abstractmethod
    def token_mask(self, last: Int[np.ndarray, "T"], length: int) -> Bool[np.ndarray, "T {length} 1"]:
        """The token mask: the positions where the learned parameters enter, of `length` tokens.

        `last` is the position of `word`'s last token in each prompt, -1 in one that lacks it.
        """

    @abc.abstractmethod
    def apply_to_prompts(
        self, learned: Params, prompts: tuple[PromptStates, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[PromptStates, ...], Sequence[Prefix | None]]:
        """Returns each text encoder's prompts, changed by the learned parameters, and its prefix, if any."""

    def misfit(self, learned: Params, networks: Networks) -> str | None:
        """Says how the learned arrays do not fit the networks; None if they do."""
        expected = jax.eval_shape(lambda: self.init(jax.random.key(0), networks))
        found, expected = (jax.tree.map(np.shape, tree) for tree in (learned, expected))
        return None if found == expected else "arrays of other names or shapes than those of its networks"

    def word(self, class_word: str) -> str:
        """The word that the learned parameters belong to: the identifier or, without one, the class word."""
        return self.identifier or class_word

    def prompt_ids(self, tokenizer: Tokenizer, ids: tuple[int, ...], class_word: str) -> tuple[int, ...]:
        """Returns a prompt's tokens as the text encoder is given them: with the identifier, if the method has one."""
        return put_before(tokenizer, ids, class_word, self.identifier) if self.identifier else ids

    def condition(
        self,
        learned: Params,
        prompts: tuple[PromptStates, ...],
        text_params: tuple[Params, ...],
        networks: Networks,
        strength: Float[Array, ""] | float = 1.0,
    ) -> Context:
        """Returns the UNet's text conditioning, from the states below `first_layers`."""
        changed, prefixes = self.apply_to_prompts(learned, prompts, strength)
        return upper_layers(networks.text, text_params, changed, prefixes, self.first_layers(networks))

    def unet(self, learned: Params, unet: Params, strength: Float[Array, ""] | float = 1.0) -> Params:
        """Returns the UNet's parameters, with the method's change if it has one."""
        return unet


@dataclass(frozen=True)
class TextUnchanged(Method):
    """A method that does not change the text encoders."""

    def first_layers(self, networks: Networks) -> tuple[int, ...]:
        # After the last layer that reaches the UNet: the text states are then computed once per prompt.
        return tuple(encoder.config.depth for encoder in networks.text)

    def token_mask(self, last: Int[np.ndarray, "T"], length: int) -> Bool[np.ndarray, "T {length} 1"]:
        return np.zeros((len(last), length, 1), bool)

    def apply_to_prompts(
        self, learned: Params, prompts: tuple[PromptStates, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[PromptStates, ...], Sequence[Prefix | None]]:
        return prompts, (None,) * len(prompts)


@dataclass(frozen=True)
class BaseModel(TextUnchanged):
    """The base model itself: nothing is trained."""

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        return {}


def check_keys(metadata: Mapping[str, Any], required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raises ValueError if the metadata lacks a required key or has an unknown one."""
    if odd := sorted((metadata.keys() ^ required) - optional):
        raise ValueError(f"metadata missing or unknown: {', '.join(odd)}")


def of_encoders(name: str, count: int) -> tuple[str, ...]:
    """The names of an array for each of `count` text encoders: `name` and, in SDXL, `name`_2."""
    return (name, f"{name}_2")[:count]
