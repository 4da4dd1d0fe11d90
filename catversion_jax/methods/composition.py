"""Several concepts in one prompt: which of them can share it, and the words that they enter at."""

from collections.abc import Sequence

import numpy as np

from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import find_words
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, Int


def check_composition(concepts: Sequence[Concept]) -> None:
    """Raises UserError for concepts that cannot share a prompt.

    Each has a conditional branch of the UNet and a place of its own (sampling/regions.py), so that the concepts need
    different class words, and their methods have to leave the prompt's tokens and the UNet as they are.
    """
    if len(concepts) < 2:
        return
    words = [concept.class_word.lower() for concept in concepts]
    if "" in words or len(set(words)) < len(words):
        raise UserError(f"class words {words}: expected another one for each concept of a prompt")
    if odd := [concept.method_name for concept in concepts if concept.method.changes_unet]:
        raise UserError(
            f"the concepts of {', '.join(words)}: cannot share a prompt, because {odd[0]} changes the UNet; expected "
            "all by a method that leaves the UNet as it is, such as catversion"
        )


def words_of(concepts: Sequence[Concept]) -> list[str]:
    """The word that each concept's learned parameters belong to."""
    return [concept.method.word(concept.class_word) for concept in concepts]


def token_ids(tokenizer: Tokenizer, prompts: Sequence[str], concept: Concept | None) -> Int[np.ndarray, "T Q"]:
    """Returns what a text encoder is given: the prompts' tokens, with the concept's identifier, if it has one."""
    return tokenizer.fit([prompt_ids(tokenizer, prompt, concept) for prompt in prompts])


def prompt_ids(tokenizer: Tokenizer, prompt: str, concept: Concept | None) -> tuple[int, ...]:
    """Returns a prompt's tokens, of any number, with the concept's identifier, if it has one."""
    ids = tokenizer.word(prompt)
    return ids if concept is None else concept.method.prompt_ids(tokenizer, ids, concept.class_word)


def token_mask(
    tokenizer: Tokenizer, token_ids: Int[np.ndarray, "T Q"], concept: Concept, others: Sequence[Concept] = ()
) -> Bool[np.ndarray, "T Q 1"]:
    """Returns where a concept's learned parameters enter prompts that it shares with `others`.

    A token belongs to one word: "mug" is not the mug of "coffee mug" if both are concepts. Beside others, a concept
    enters only prompts that hold its word, whatever its scope: without one it has no place.
    """
    last, *_ = find_words(tokenizer, token_ids, words_of([concept, *others]))
    mask = concept.method.token_mask(last, token_ids.shape[1])
    return mask & (last >= 0)[:, None, None] if others else mask
