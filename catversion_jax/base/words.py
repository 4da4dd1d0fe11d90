"""Words among a prompt's tokens: one matcher for all methods, for the class word and for identifiers.

A word, or several in a row, is looked for as the tokens that the tokenizer makes of it. So upper and lower case, spaces
and the two Unicode forms of an accented letter make no difference; a plural is another word.
"""

from collections.abc import Sequence

import numpy as np

from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.utils.types import Float, Int


def find_words(tokenizer: Tokenizer, token_ids: Int[np.ndarray, "T Q"], words: Sequence[str]) -> list[np.ndarray]:
    """Returns, for each word, the position [T] of its last token in each prompt, or -1 if the prompt lacks it.

    The first occurrence counts, as whole words only: "can" is not in "toucan", whose last token it is. Words do not
    share tokens, and longer ones choose first: "mug" is not the mug of "coffee mug" if both are looked for. A word that
    the tokenizer has no tokens for is in no prompt.
    """
    prompts, length = token_ids.shape
    # A token that does not end a word goes on in the next one.
    begins = np.concatenate([np.ones((prompts, 1), bool), tokenizer.ends_word[token_ids[:, :-1]]], axis=1)
    taken = np.zeros(token_ids.shape, bool)
    found = [np.full(prompts, -1) for _ in words]
    for index, word in sorted(enumerate(map(tokenizer.word, words)), key=lambda item: -len(item[1])):
        size = len(word)
        if not 0 < size <= length or tokenizer.unknown in word:
            continue
        windows, free = (np.lib.stride_tricks.sliding_window_view(x, size, axis=1) for x in (token_ids, ~taken))
        hits = (windows == np.asarray(word)).all(-1) & free.all(-1) & begins[:, : length - size + 1]
        last = np.where(hits.any(1), hits.argmax(1) + size - 1, -1)
        found[index] = last
        positions = np.arange(length)
        taken |= (positions > last[:, None] - size) & (positions <= last[:, None])
    return found


def find_word(tokenizer: Tokenizer, token_ids: Int[np.ndarray, "T Q"], word: str) -> Int[np.ndarray, "T"]:
    """Returns the position of the word's last token in each prompt, or -1, as `find_words` does."""
    (last,) = find_words(tokenizer, token_ids, [word])
    return last


def token_weights(
    tokenizer: Tokenizer, token_ids: Int[np.ndarray, "T Q"], words: Sequence[str]
) -> Float[np.ndarray, "words T Q"]:
    """Returns weights of each word's tokens in each prompt, which sum to 1, or to 0 where the prompt lacks the word."""
    lengths = np.asarray([max(1, len(tokenizer.word(word))) for word in words])[:, None, None]
    last, positions = np.stack(find_words(tokenizer, token_ids, words))[..., None], np.arange(token_ids.shape[1])
    return ((last >= 0) & (positions > last - lengths) & (positions <= last)) / np.float32(lengths)


def put_before(tokenizer: Tokenizer, ids: tuple[int, ...], class_word: str, identifier: str) -> tuple[int, ...]:
    """Returns a prompt's tokens with an identifier before the class word, if that is there and the identifier not."""
    last = int(find_word(tokenizer, np.asarray([ids], np.int32).reshape(1, -1), class_word)[0])
    start = last - len(tokenizer.word(class_word)) + 1
    put = tokenizer.word(identifier)
    if last < 0 or ids[max(0, start - len(put)) : start] == put:
        return ids
    return ids[:start] + put + ids[start:]


def without_word(tokenizers: Sequence[Tokenizer], class_word: str, prompts: Sequence[str]) -> list[str]:
    """Returns the prompts in which a text encoder does not find the class word, cut ones included.

    All of them if the class word is unknown ("").
    """
    if not class_word:
        return list(prompts)
    (without,) = without_words(tokenizers, [class_word], prompts)
    return without


def without_words(
    tokenizers: Sequence[Tokenizer], class_words: Sequence[str], prompts: Sequence[str]
) -> list[list[str]]:
    """Returns, for each class word, the prompts in which a text encoder does not find it beside the others."""
    found = [find_words(tokenizer, tokenizer(list(prompts)), class_words) for tokenizer in tokenizers]
    last = np.min(found, axis=0) if class_words and prompts else np.zeros((len(class_words), len(prompts)))
    return [[prompt for prompt, place in zip(prompts, of_word, strict=True) if place < 0] for of_word in last]


def is_word_cut(tokenizer: Tokenizer, class_word: str, prompt: str) -> bool:
    """Whether a prompt holds the class word, but only behind the tokens that the text encoder takes."""
    whole = np.asarray([tokenizer.word(prompt)], np.int32)
    return bool(whole.size and find_word(tokenizer, whole, class_word)[0] >= tokenizer.length - 2)
