"""CLIP's tokenizer."""

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.base.tokenizer_files import Vocabulary, read_vocabulary
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, Int

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's words (simple_tokenizer.py of OpenAI's CLIP), each of which is encoded by itself."""


class Tokenizer:
    """CLIP's tokenizer, read from a diffusers folder; pads or truncates token ids to the model's length (77)."""

    def __init__(self, folder: Path):
        self.vocabulary = read_vocabulary(folder)
        self.length = self.vocabulary.length
        self._encoder = byte_pair_encoder(self.vocabulary)

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "T Q"]:
        return self.fit([self.word(prompt) for prompt in prompts])

    def fit(self, prompts: Sequence[tuple[int, ...]]) -> Int[np.ndarray, "T Q"]:
        """Puts the start token before and the end token after each prompt's tokens; cuts or pads them to `length`."""
        start, most = self._special("bos_token"), self.length - 2
        rows = np.full((len(prompts), self.length), self._special("pad_token"), np.int32)
        for row, ids in zip(rows, prompts, strict=True):
            whole = (start, *ids[:most], self.end)
            row[: len(whole)] = whole
        return rows

    def word(self, word: str) -> tuple[int, ...]:
        """The token ids of any text, without start and end token."""
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r}: holds half of a character; write the prompt in UTF-8") from None
        return tuple(self._encoder.encode(word, add_special_tokens=False).ids)

    @property
    def end(self) -> int:
        """The token at a prompt's end."""
        return self._special("eos_token")

    @property
    def unknown(self) -> int:
        """The token that stands for what the vocabulary has no tokens for."""
        return self._special("unk_token")

    def _special(self, name: str) -> int:
        return self._encoder.token_to_id(self.vocabulary.special[name].content)

    @cached_property
    def ends_word(self) -> Bool[np.ndarray, "vocabulary"]:
        """Which tokens end a word: those that CLIP marks with </w>, the special ones, and those that were added."""
        ends = np.zeros(self.vocabulary.size, bool)
        whole = {token.content for token in self.vocabulary.added}
        tokens = self._encoder.get_vocab().items()
        ends[[i for token, i in tokens if token.endswith("</w>") or token in whole]] = True
        return ends

    def token(self, token_id: int) -> str:
        """The text of a token."""
        return self._encoder.id_to_token(token_id).removesuffix("</w>")


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
