"""CLIP's tokenizer."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, Int


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

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "T Q"]:
        return self.fit([self.word(prompt) for prompt in prompts])

    def fit(self, prompts: Sequence[tuple[int, ...]]) -> Int[np.ndarray, "T Q"]:
        """Puts the start token before and the end token after each prompt's tokens; cuts or pads them to `length`."""
        tokenizer, most = self._tokenizer, self.length - 2
        rows = np.full((len(prompts), self.length), tokenizer.pad_token_id, np.int32)
        for row, ids in zip(rows, prompts, strict=True):
            whole = (tokenizer.bos_token_id, *ids[:most], tokenizer.eos_token_id)
            row[: len(whole)] = whole
        return rows

    def word(self, word: str) -> tuple[int, ...]:
        """The token ids of any text, without start and end token."""
        return tuple(self._tokenizer(word, add_special_tokens=False)["input_ids"])

    @property
    def unknown(self) -> int:
        """The token that stands for what the vocabulary has no tokens for."""
        return self._tokenizer.unk_token_id

    @cached_property
    def ends_word(self) -> Bool[np.ndarray, "vocabulary"]:
        """Which tokens end a word: those that CLIP marks with </w>, and the special ones."""
        tokens = self._tokenizer.get_vocab()
        ends = np.zeros(max(tokens.values()) + 1, bool)
        special = set(self._tokenizer.all_special_tokens)
        ends[[i for token, i in tokens.items() if token.endswith("</w>") or token in special]] = True
        return ends

    def token(self, token_id: int) -> str:
        """The text of a token."""
        return self._tokenizer.convert_ids_to_tokens(token_id).removesuffix("</w>")
