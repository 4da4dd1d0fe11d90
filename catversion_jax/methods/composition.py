"""The concepts of a prompt: one or, side by side, several, each seen from its own class word on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np

from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.methods.base import BaseModel, Method
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, Int, Params


@dataclass(frozen=True, eq=False)
class Composition:
    """Concepts that act together: by one method, on what each of them learned."""

    concepts: tuple[Concept, ...]
    method: Method
    learned: Params

    def prompt(self, prompt: str) -> str:
        """A prompt as the text encoder is given it."""
        for concept in self.concepts:
            prompt = concept.method.prompt(prompt, concept.class_word)
        return prompt

    def token_masks(
        self, tokenizer: Tokenizer, token_ids: Sequence[Int[np.ndarray, "T Q"]]
    ) -> tuple[Bool[np.ndarray, "T Q #P"], ...]:
        """For each text encoder's tokens, the positions where what was learned, or each of its P parts, enters."""
        words = [tokenizer.word(concept.method.identifier or concept.class_word) for concept in self.concepts]
        if len(words) < 2:
            word = words[0] if words else ()
            return tuple(self.method.token_mask(ids, word) for ids in token_ids)
        lengths = [len(concept.learned["prefix"]) for concept in self.concepts]
        return tuple(
            np.concatenate(
                [
                    np.repeat(self.method.token_mask(ids, word), length, axis=-1)
                    for word, length in zip(words, lengths, strict=True)
                ],
                axis=-1,
            )
            for ids in token_ids
        )


def compose(concepts: Sequence[Concept]) -> Composition:
    """One concept as it was learned, none as the base model, and several of CatVersion's next to each other: their
    prefixes are joined, and each is seen from its own class word on, whatever its scope.

    Raises UserError for concepts that cannot share a prompt.
    """
    if not concepts:
        return Composition((), BaseModel(), {})
    first, *others = concepts
    if not others:
        return Composition((first,), first.method, first.learned)
    words = [concept.class_word.lower() for concept in concepts]
    if "" in words or len(set(words)) < len(words):
        raise UserError(f"class words {words}: expected another one for each concept of a prompt")
    methods = [isinstance(c.method, CatVersion) and replace(c.method, scope="trigger") for c in concepts]
    shapes = [jax.tree.map(lambda x: x.shape[1:], c.learned) for c in concepts]
    if not all(methods) or any(other != (methods[0], shapes[0]) for other in zip(methods, shapes, strict=True)):
        raise UserError(
            f"the concepts of {', '.join(words)}: cannot share a prompt; expected all by method catversion, of one "
            "base model, with the same adapter.layers and adapter.logit_bias"
        )
    joined = jax.tree.map(lambda *prefixes: np.concatenate(prefixes), *(concept.learned for concept in concepts))
    return Composition(tuple(concepts), methods[0], joined)


@dataclass(frozen=True, eq=False)
class Personalization:
    """What images are personalized with: concepts at a strength from 1, as learned, down to 0.

    At 0, or without concepts, it is the base model, exactly.
    """

    concepts: tuple[Concept, ...] = ()
    strength: float = 1.0

    @cached_property
    def composition(self) -> Composition:
        """The concepts as they act. Raises UserError for concepts that cannot share a prompt."""
        return compose(self.concepts if self.strength else ())


BASE_MODEL = Personalization()
"""No concept."""
