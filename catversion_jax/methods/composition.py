"""The concepts of a prompt: none, one, or several side by side, each seen from its own class word on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np

from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import find_words
from catversion_jax.methods.base import BaseModel, Method
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, Int, Params


@dataclass(frozen=True, eq=False)
class Composition:
    """Concepts that act together: one method, and the learned parameters of all of them."""

    concepts: tuple[Concept, ...]
    method: Method
    learned: Params

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
        """Returns the tokens of a prompt, of any length, with the concepts' identifiers."""
        ids = tokenizer.word(prompt)
        for concept in self.concepts:
            ids = concept.method.prompt_ids(tokenizer, ids, concept.class_word)
        return ids

    def token_ids(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> Int[np.ndarray, "T Q"]:
        """Returns the tokens that a text encoder is given."""
        return tokenizer.fit([self.prompt_ids(tokenizer, prompt) for prompt in prompts])

    def token_mask(self, tokenizer: Tokenizer, token_ids: Int[np.ndarray, "T Q"]) -> Bool[np.ndarray, "T Q #P"]:
        """A text encoder's token mask: where the learned parameters, or the P prefix positions, enter."""
        prompts, length = token_ids.shape
        words = [concept.method.word(concept.class_word) for concept in self.concepts]
        found = find_words(tokenizer, token_ids, words) or [np.full(prompts, -1)]
        masks = [self.method.token_mask(last, length) for last in found]
        if len(masks) == 1:
            return masks[0]
        # The prefixes are joined along P, so each concept's token mask is repeated over its own positions.
        lengths = [len(concept.learned["prefix"]) for concept in self.concepts]
        return np.concatenate([np.repeat(m, size, axis=-1) for m, size in zip(masks, lengths, strict=True)], axis=-1)


def compose(concepts: Sequence[Concept]) -> Composition:
    """Composes concepts: no concepts give the base model, and a single one is used as it was trained.

    The prefixes of several, all of CatVersion, are joined, and each is seen from its own class word on, whatever its
    scope. Raises UserError for concepts that cannot share a prompt.
    """
    if not concepts:
        return Composition((), BaseModel(), {})
    first, *others = concepts
    if not others:
        return Composition((first,), first.method, first.learned)
    words = [concept.class_word.lower() for concept in concepts]
    if "" in words or len(set(words)) < len(words):
        raise UserError(f"class words {words}: expected another one for each concept of a prompt")
    # A prefix is a set of keys and values, so prefixes join as more positions of the same attention, if they have the
    # same layers, bias and base model. With scope "all", every token would see every concept; "trigger" keeps a
    # concept's prefix from the tokens before its own class word.
    methods = [replace(c.method, scope="trigger") for c in concepts if isinstance(c.method, CatVersion)]
    shapes = [jax.tree.map(lambda x: x.shape[1:], c.learned) for c in concepts]
    if len(methods) < len(concepts) or any(x != methods[0] for x in methods) or any(x != shapes[0] for x in shapes):
        raise UserError(
            f"the concepts of {', '.join(words)}: cannot share a prompt; expected all by method catversion, of one "
            "base model, with the same adapter.layers and adapter.logit_bias"
        )
    joined = jax.tree.map(lambda *prefixes: np.concatenate(prefixes), *(concept.learned for concept in concepts))
    return Composition(tuple(concepts), methods[0], joined)


@dataclass(frozen=True, eq=False)
class Personalization:
    """The concepts to sample with, and their strength: 1 is as trained, 0 is exactly the base model."""

    concepts: tuple[Concept, ...] = ()
    strength: float = 1.0

    @cached_property
    def composition(self) -> Composition:
        """The composed concepts. Raises UserError for concepts that cannot share a prompt."""
        # At strength 0 the concepts are left out, not scaled by 0: the base model's own text states are used.
        return compose(self.concepts if self.strength else ())


BASE_MODEL = Personalization()
"""No concepts: the base model."""
