"""CLIP's tokenizer, and the class word's position among a prompt's tokens."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Int


class Tokenizer:
    """CLIP's tokenizer, read from a diffusers folder; pads or truncates token ids to the model's length (77)."""

    def __init__(self, folder: Path):
        # Imported here, because it takes a second and half of the commands do not need it.
        from transformers import CLIPTokenizer

        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: no {' and no '.join(missing)}; expected a CLIP tokenizer of a diffusers folder")
        config = folder / "tokenizer_config.json"
        self.length = json.loads(config.read_text())["model_max_length"] if config.is_file() else 77
        self._tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)

    def __call__(self, prompts: list[str]) -> Int[np.ndarray, "T Q"]:
        out = self._tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True)
        return np.asarray(out["input_ids"], np.int32)

    def word(self, word: str) -> tuple[int, ...]:
        """The token ids of one or more words, without start and end token."""
        return tuple(self._tokenizer(word, add_special_tokens=False)["input_ids"])

    def token(self, token_id: int) -> str:
        """The text of a token."""
        return self._tokenizer.convert_ids_to_tokens(token_id).removesuffix("</w>")

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is too long for the text encoder, so that its end is cut off."""
        return len(self.word(prompt)) > self.length - 2


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
