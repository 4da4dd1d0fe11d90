"""Several concepts in one prompt: which of them can share it, and the words that they enter at."""

from collections.abc import Sequence

import numpy as np

from catversion_jax.base.prompt_tokens import PromptTokens, read_prompt
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool


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


def tokens_for(tokenizer: Tokenizer, prompt: str, concept: Concept | None) -> PromptTokens:
    """Returns what a text encoder is given: the prompt's tokens, with the concept's identifier, if it has one."""
    if concept is None:
        return read_prompt(tokenizer, prompt)
    method = concept.method
    return read_prompt(tokenizer, prompt, concept.class_word, method.identifier, method.vectors)


def token_mask(
    tokenizer: Tokenizer, prompt: PromptTokens, concept: Concept, others: Sequence[Concept] = ()
) -> Bool[np.ndarray, "C Q _"]:
    """Returns where a concept's learned parameters enter a prompt that it shares with `others`.

    Every chunk of a long prompt is read by itself, so the first word of each counts. A token belongs to one word: "mug"
    is not the mug of "coffee mug" if both are concepts. Beside others, a concept enters only prompts that hold its
    word, whatever its scope: without one it has no place.
    """
    if concept.method.vectors:
        return prompt.vector[..., None] == np.arange(concept.method.vectors)
    ends = prompt.ends_of(tokenizer, words_of([concept, *others]))[0]
    last = np.where(ends.any(1), ends.argmax(1), -1)
    mask = concept.method.token_mask(last, ends.shape[1])
    return mask & ends.any() if others else mask
