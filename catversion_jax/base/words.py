"""Words among a prompt's tokens: one matcher for all methods, for the class word and for identifiers.

A word, or several in a row, is looked for as the tokens that the tokenizer makes of it. So upper and lower case, spaces
and the two Unicode forms of an accented letter make no difference; a plural is another word.
"""

from collections.abc import Sequence

import numpy as np

from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.utils.types import Bool, Float, Int


def ends_of_words(
    tokenizer: Tokenizer, token_ids: Int[np.ndarray, "T Q"], words: Sequence[str]
) -> Bool[np.ndarray, "W T Q"]:
    """Returns where each word ends in each prompt.

    Whole words only: "can" is not in "toucan", whose last token it is. Words do not share tokens, and longer ones
    choose first: "mug" is not the mug of "coffee mug" if both are looked for. A word that the tokenizer has no tokens
    for is in no prompt.
    """
    prompts, length = token_ids.shape
    # A token that does not end a word goes on in the next one.
    begins = np.concatenate([np.ones((prompts, 1), bool), tokenizer.ends_word[token_ids[:, :-1]]], axis=1)
    taken = np.zeros(token_ids.shape, bool)
    ends = np.zeros((len(words), *token_ids.shape), bool)
    for index, word in sorted(enumerate(map(tokenizer.word, words)), key=lambda item: -len(item[1])):
        size = len(word)
        if not 0 < size <= length or tokenizer.unknown in word:
            continue
        windows, free = (np.lib.stride_tricks.sliding_window_view(x, size, axis=1) for x in (token_ids, ~taken))
        hits = (windows == np.asarray(word)).all(-1) & free.all(-1) & begins[:, : length - size + 1]
        ends[index, :, size - 1 :] = hits
        for i in range(size):
            taken[:, i : length - size + 1 + i] |= hits
    return ends


def find_words(tokenizer: Tokenizer, token_ids: Int[np.ndarray, "T Q"], words: Sequence[str]) -> list[np.ndarray]:
    """Returns, for each word, the position [T] of its first occurrence's last token in each prompt, -1 without one."""
    return [np.where(ends.any(1), ends.argmax(1), -1) for ends in ends_of_words(tokenizer, token_ids, words)]


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


def place_before(tokenizer: Tokenizer, ids: tuple[int, ...], class_word: str, identifier: str) -> int | None:
    """Returns where the class word begins among a prompt's tokens; None without it, and behind the identifier."""
    if not ids:
        return None
    last = int(find_word(tokenizer, np.asarray([ids], np.int32), class_word)[0])
    start = last - len(tokenizer.word(class_word)) + 1
    put = tokenizer.word(identifier)
    return None if last < 0 or ids[max(0, start - len(put)) : start] == put else start


def put_before(tokenizer: Tokenizer, ids: tuple[int, ...], class_word: str, identifier: str) -> tuple[int, ...]:
    """Returns a prompt's tokens with an identifier before the class word, if that is there and the identifier not."""
    start = place_before(tokenizer, ids, class_word, identifier)
    return ids if start is None else ids[:start] + tokenizer.word(identifier) + ids[start:]


def without_word(tokenizers: Sequence[Tokenizer], class_word: str, prompts: Sequence[str]) -> list[str]:
    """Returns the training prompts in which a text encoder does not find the class word, cut ones included.

    All of them if the class word is unknown ("").
    """
    places = [find_word(tokenizer, tokenizer(list(prompts)), class_word) for tokenizer in tokenizers]
    return [prompt for prompt, *found in zip(prompts, *places, strict=True) if min(found) < 0]
