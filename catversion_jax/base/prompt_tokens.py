"""A prompt as a text encoder reads it: of any length, in chunks of as many tokens as the encoder takes.

Each chunk has a start and an end token of its own and goes through the text encoder by itself; the UNet takes the
states of all of them, end to end. A part of the prompt with a weight of its own that has fewer than WHOLE tokens is not
divided: it begins the next chunk. So does ComfyUI (comfy/sd1_clip.py).
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from catversion_jax.base.prompt_weights import weighted_parts
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import ends_of_words, place_before, token_weights
from catversion_jax.utils.types import Bool, Float, Int

WHOLE = 8
PLACEHOLDER = 0
"""The token that keeps the place of a vector: any that is in every vocabulary."""


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of one prompt for one text encoder, in C chunks of Q tokens."""

    ids: Int[np.ndarray, "C Q"]
    weights: Float[np.ndarray, "C Q"]
    is_text: Bool[np.ndarray, "C Q"]  # of the prompt, not a start, end or padding token
    vector: Int[np.ndarray, "C Q"]  # which of an embedding's vectors stands here; -1: none

    def ends_of(self, tokenizer: Tokenizer, words: Sequence[str]) -> Bool[np.ndarray, "W C Q"]:
        """Returns where each word ends, as words.ends_of_words does; a word may go over from one chunk to the next."""
        out = np.zeros((len(words), *self.ids.shape), bool)
        out[:, self.is_text] = ends_of_words(tokenizer, self.ids[self.is_text][None], words)[:, 0]
        return out


def read_prompt(
    tokenizer: Tokenizer, prompt: str, class_word: str = "", identifier: str = "", vectors: int = 0
) -> PromptTokens:
    """Returns a prompt's tokens; an identifier is put before the class word, if that is there.

    `vectors` take the place of the class word, wherever it stands.
    """
    put = tuple(~j for j in range(vectors))  # below 0: the vectors' places among the tokens
    parts = [
        (tuple(itertools.chain.from_iterable(with_between(map(tokenizer.word, texts), put))), weight)
        for texts, weight in divided(prompt, class_word if vectors else "")
    ]
    if identifier:
        parts = put_into(
            parts, tokenizer.word(identifier), place_before(tokenizer, ids_of(parts), class_word, identifier)
        )
    chunks = in_chunks([part for part in parts if part[0]], tokenizer.length - 2)
    given = [[token for token, _ in chunk] for chunk in chunks]
    ids = tokenizer.fit([tuple(max(token, PLACEHOLDER) for token in chunk) for chunk in given])
    weights, is_text = np.ones(ids.shape, np.float32), np.zeros(ids.shape, bool)
    vector = np.full(ids.shape, -1)
    for row, chunk in enumerate(chunks):
        inside = slice(1, 1 + len(chunk))
        weights[row, inside], is_text[row, inside] = [weight for _, weight in chunk], True
        vector[row, inside] = [~token if token < 0 else -1 for token, _ in chunk]
    return PromptTokens(ids, weights, is_text, vector)


def ids_of(parts: Sequence[tuple[tuple[int, ...], float]]) -> tuple[int, ...]:
    return tuple(token for ids, _ in parts for token in ids)


def divided(prompt: str, word: str) -> Iterator[tuple[list[str], float]]:
    """Yields a prompt's parts with their weights, each divided at a word, if there is one: whole, in any case.

    By its letters and not by its tokens: "<toy>," has those of "<" and "toy", and one for ">,".
    """
    edges = [r"\b" if edge.isalnum() else "" for edge in (word[:1], word[-1:])]
    for text, weight in weighted_parts(prompt):
        yield re.split(f"{edges[0]}{re.escape(word)}{edges[1]}", text, flags=re.IGNORECASE) if word else [text], weight


def with_between(pieces: Iterable[tuple[int, ...]], put: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields pieces with something put between them."""
    for i, piece in enumerate(pieces):
        if i:
            yield put
        yield piece


def put_into(
    parts: Sequence[tuple[tuple[int, ...], float]], put: tuple[int, ...], place: int | None
) -> list[tuple[tuple[int, ...], float]]:
    """Returns the parts with tokens put before the one at `place`, with its weight; as they are without a place."""
    out, start = [], 0
    for ids, weight in parts:
        at = -1 if place is None else place - start
        out.append((ids[:at] + put + ids[at:] if 0 <= at < len(ids) else ids, weight))
        start += len(ids)
    return out


def in_chunks(parts: Sequence[tuple[tuple[int, ...], float]], room: int) -> list[list[tuple[int, float]]]:
    """Returns tokens with their weights in chunks of at most `room`; there is at least one chunk."""
    chunks: list[list[tuple[int, float]]] = [[]]
    for ids, weight in parts:
        may_divide = len(ids) >= WHOLE or len(ids) > room
        while len(ids) > room - len(chunks[-1]):
            taken = room - len(chunks[-1]) if may_divide else 0
            chunks[-1] += [(token, weight) for token in ids[:taken]]
            chunks.append([])
            ids = ids[taken:]
        chunks[-1] += [(token, weight) for token in ids]
    return chunks


def prompts_without(
    tokenizers: Sequence[Tokenizer], class_words: Sequence[str], prompts: Sequence[str]
) -> list[list[str]]:
    """Returns, for each class word, the prompts in which a text encoder does not find it beside the others.

    All of them for an unknown class word ("").
    """
    held = np.ones((len(class_words), len(prompts)), bool)
    for tokenizer in tokenizers:
        for i, prompt in enumerate(prompts):
            held[:, i] &= read_prompt(tokenizer, prompt).ends_of(tokenizer, class_words).any((1, 2))
    return [[prompt for prompt, holds in zip(prompts, of_word, strict=True) if not holds] for of_word in held]


def word_weights(
    tokenizer: Tokenizer, prompts: Sequence[PromptTokens], words: Sequence[str]
) -> Float[np.ndarray, "W B K"]:
    """Returns weights of the tokens of each word's first occurrence in each prompt, its chunks end to end.

    They sum to 1, or to 0 where the prompt lacks the word. All prompts have as many chunks.
    """
    out = np.zeros((len(words), len(prompts), prompts[0].ids.size), np.float32)
    for i, prompt in enumerate(prompts):
        if prompt.is_text.any():
            of_text = token_weights(tokenizer, prompt.ids[prompt.is_text][None], words)
            out[:, i, prompt.is_text.ravel()] = of_text[:, 0]
    return out
