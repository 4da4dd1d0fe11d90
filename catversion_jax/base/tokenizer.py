"""CLIP's tokenizer, and the class word's position among a prompt's tokens."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.base.tokenizer_files import Vocabulary, read_vocabulary
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Int

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's words (simple_tokenizer.py of OpenAI's CLIP), each of which is encoded by itself."""


class Tokenizer:
    """CLIP's tokenizer, read from a diffusers folder; pads or truncates token ids to the model's length (77)."""

    def __init__(self, folder: Path):
        self.vocabulary = read_vocabulary(folder)
        self.length = self.vocabulary.length
        self._tokenizer = byte_pair_encoder(self.vocabulary)
        self._start, self.end, self._pad = (
            self._tokenizer.token_to_id(self.vocabulary.special[name].content)
            for name in ("bos_token", "eos_token", "pad_token")
        )

    def __call__(self, prompts: list[str]) -> Int[np.ndarray, "T Q"]:
        """Returns the token ids, with start and end token; a prompt that is too long is cut."""
        token_ids = np.full((len(prompts), self.length), self._pad, np.int32)
        for row, prompt in zip(token_ids, prompts, strict=True):
            words = self.word(prompt)[: self.length - 2]
            row[: len(words) + 2] = (self._start, *words, self.end)
        return token_ids

    def word(self, word: str) -> tuple[int, ...]:
        """The token ids of one or more words, without start and end token."""
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r}: holds half of a character; write the prompt in UTF-8") from None
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)

    def token(self, token_id: int) -> str:
        """The text of a token."""
        return self._tokenizer.id_to_token(token_id).removesuffix("</w>")

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is too long for the text encoder, so that its end is cut off."""
        return len(self.word(prompt)) > self.length - 2


def byte_pair_encoder(vocabulary: Vocabulary) -> Any:
    """Builds the encoder of every CLIP, as transformers' CLIPTokenizer does; returns a `tokenizers.Tokenizer`."""
    # Imported here, because many commands do not need it. transformers, which builds the same, takes seconds to import.
    import tokenizers
    from tokenizers import Regex, normalizers, pre_tokenizers

    unknown = vocabulary.special["unk_token"].content
    pairs = tokenizers.models.BPE(
        vocabulary.ids, vocabulary.merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    encoder = tokenizers.Tokenizer(pairs)
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for is_special, group in itertools.groupby(vocabulary.added, lambda token: token.special):
        tokens = [
            tokenizers.AddedToken(
                t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized,
                special=is_special,
            )
            for t in group
        ]  # fmt: skip
        (encoder.add_special_tokens if is_special else encoder.add_tokens)(tokens)
    return encoder


def find_word(token_ids: Int[np.ndarray, "T Q"], word: tuple[int, ...]) -> Int[np.ndarray, "T"]:
    """The position of the last token of the word's first occurrence in each prompt, or -1 if it does not occur.

    The whole token sequence of the word has to match. Tokens are case-folded; a plural is another token.
    """
    windows = np.lib.stride_tricks.sliding_window_view(token_ids, len(word), axis=1)
    hits = (windows == np.asarray(word)).all(-1)
    return np.where(hits.any(1), hits.argmax(1) + len(word) - 1, -1)


def without_word(tokenizer: Tokenizer, class_word: str, prompts: Sequence[str]) -> list[str]:
    """The prompts that do not contain the class word; all of them if the class word is unknown ("")."""
    if not class_word:
        return list(prompts)
    positions = find_word(tokenizer(list(prompts)), tokenizer.word(class_word))
    return [prompt for prompt, position in zip(prompts, positions, strict=True) if position < 0]


def put_before(prompt: str, class_word: str, identifier: str) -> str:
    """Inserts an identifier before the first occurrence of the class word, if the prompt contains it."""
    word = rf"(?<!\w){re.escape(class_word)}(?!\w)"
    return re.sub(word, lambda match: f"{identifier} {match[0]}", prompt, count=1, flags=re.IGNORECASE)
