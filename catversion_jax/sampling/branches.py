"""The conditional branches of an image: one, or with several concepts one for the base model and one for each."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.base.prompt_tokens import word_weights
from catversion_jax.methods.concept_file import Concept
from catversion_jax.models.unet import Context
from catversion_jax.sampling.conditioning import condition, same_length, tokens_of
from catversion_jax.utils.types import Float


class Branches(NamedTuple):
    """The conditioning of one image, or of several with the same key."""

    contexts: list[Context]  # of each branch
    of_words: Float[np.ndarray, "W B K"] | None  # with several concepts, where the word of each is (regions.py)


class BatchKey(NamedTuple):
    """What the images of a batch have in common."""

    unet: int  # identity of the concept that changes the UNet; 0: none
    concepts: int  # that act
    chunks: tuple[int, ...]  # of each branch: an image does not depend on how long its neighbours' prompts are


def batch_key(pipeline: BasePipeline, prompt: str, concepts: Sequence[Concept]) -> BatchKey:
    """Returns the key of an image of a prompt with the concepts that act in it."""
    changing = [id(concept) for concept in concepts if concept.method.changes_unet]
    # One concept has as many branches as none.
    of_branches: list[Concept | None] = [None, *concepts] if len(concepts) > 1 else [*concepts] or [None]
    chunks = [len(tokens_of(pipeline, [prompt], concept)[0][0].ids) for concept in of_branches]
    return BatchKey(sum(changing), max(1, len(concepts)), tuple(chunks))


def branches_of(pipeline: BasePipeline, prompt: str, concepts: Sequence[Concept]) -> Branches:
    """Returns the branches of a prompt with the concepts that act in it."""
    prompts = [prompt]
    if len(concepts) < 2:
        return Branches([condition(pipeline, prompts, concepts[0] if concepts else None)], None)
    each = [condition(pipeline, prompts, c, [other for other in concepts if other is not c]) for c in concepts]
    tokens, words = tokens_of(pipeline, prompts, None)[0], [concept.class_word for concept in concepts]
    return Branches([condition(pipeline, prompts), *each], word_weights(pipeline.tokenizer, tokens, words))


def join_branches(
    images: Sequence[Branches], negative: Sequence[Context]
) -> tuple[Context, Float[np.ndarray, "W B K"] | None]:
    """Returns the context of a batch, [branches, B, ...], behind the negative prompt's; and where the words are."""
    of_branches = zip(*(image.contexts for image in images), strict=True)
    each = [jax.tree.map(lambda *x: jnp.concatenate(x), *of_branch) for of_branch in of_branches]
    contexts = same_length([*negative, *each])
    # The last one has the whole batch's shape.
    context = jax.tree.map(lambda *x: jnp.stack([jnp.broadcast_to(y, x[-1].shape) for y in x]), *contexts)
    words = [image.of_words for image in images if image.of_words is not None]
    if not words:
        return context, None
    of_words = np.concatenate(words, axis=1)
    return context, np.tile(of_words, contexts[-1].states.shape[1] // of_words.shape[2])


def batches_of(keys: Sequence[BatchKey], order: Sequence[int], size: int) -> list[list[int]]:
    """Returns the indices of images, taken in an order, in batches of at most `size`, each of one key."""
    batches: list[list[int]] = []
    for index in order:
        if not batches or len(batches[-1]) == size or keys[batches[-1][0]] != keys[index]:
            batches.append([])
        batches[-1].append(index)
    return batches
