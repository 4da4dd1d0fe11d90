"""The files of CLIP's tokenizer: vocab.json and merges.txt, or the tokenizer.json that transformers 5 saves alone.

They are checked here, before the tokenizers library sees them: its own errors name neither the file nor what is wrong,
and some values abort the process.
"""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.files import read_text
from catversion_jax.utils.records import MOST_BYTES, read_record

EXPECTED = "expected a CLIP tokenizer of a diffusers folder; copy or download it again"
DEFAULT_LENGTH = 77
UNLIMITED = 1e20
"""From here on, transformers' model_max_length means that none was given."""
MOST_TOKENS = 2**20  # CLIP's vocabulary has 49,408
MOST_ADDED = 4096

SPECIAL = re.compile(r"<.*>")
"""Tokens that no merge makes, such as <|endoftext|>."""

TokenId = Annotated[int, Meta(ge=0, lt=MOST_TOKENS)]


@dataclass(frozen=True)
class AddedTokenEntry:
    """A token that is found in a prompt before its words are split."""

    content: Annotated[str, Meta(min_length=1, max_length=1000)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = True
    id: TokenId | None = None


NamedToken = str | AddedTokenEntry


@dataclass(frozen=True)
class SpecialTokens:
    """special_tokens_map.json, and what tokenizer_config.json says of the same."""

    unk_token: NamedToken | None = None
    bos_token: NamedToken | None = None
    eos_token: NamedToken | None = None
    pad_token: NamedToken | None = None


NAMES = tuple(field.name for field in fields(SpecialTokens))


@dataclass(frozen=True)
class TokenizerSettings(SpecialTokens):
    """tokenizer_config.json."""

    model_max_length: int | float | None = None
    added_tokens_decoder: dict[TokenId, AddedTokenEntry] | None = None


@dataclass(frozen=True)
class BytePairs:
    """The words' parts, and which of them are merged first; the same in tokenizer.json and in the two older files."""

    vocab: dict[str, TokenId]
    merges: list[str | tuple[str, str]]
    type: Literal["BPE"] = "BPE"
    end_of_word_suffix: Literal["</w>"] | None = "</w>"


@dataclass(frozen=True)
class TokenizerFile:
    """tokenizer.json. Its normalizer and the rest are those of every CLIP, and are not read."""

    model: BytePairs
    added_tokens: list[AddedTokenEntry]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer folder, checked."""

    path: Path  # of the file with the token ids
    ids: dict[str, int]
    merges: list[tuple[str, str]]
    special: dict[str, AddedTokenEntry]  # the keys of SpecialTokens
    added: list[AddedTokenEntry]  # sorted by id; the special tokens too
    length: int  # tokens of a prompt

    @property
    def size(self) -> int:
        """The number of token ids."""
        return len(self.ids.keys() | {token.content for token in self.added})


def read_vocabulary(folder: Path) -> Vocabulary:
    """Reads a tokenizer's folder. Raises UserError, naming the file, for anything that is no CLIP tokenizer."""
    settings, special = TokenizerSettings(), SpecialTokens()
    if (folder / "tokenizer_config.json").exists():
        settings = read_record(folder / "tokenizer_config.json", TokenizerSettings, EXPECTED)
    if (folder / "special_tokens_map.json").exists():
        special = read_record(folder / "special_tokens_map.json", SpecialTokens, EXPECTED)
    path, pairs, added = read_byte_pairs(folder)
    merges = check_byte_pairs(path, pairs)
    named = special_tokens(settings, special)
    by_id = settings.added_tokens_decoder or {}
    added = [*added, *(replace(token, id=number) for number, token in by_id.items()), *named.values()]
    return Vocabulary(
        path=path,
        ids=pairs.vocab,
        merges=merges,
        special=named,
        added=check_added(path, pairs.vocab, added),
        length=checked_length(folder / "tokenizer_config.json", settings.model_max_length),
    )


def read_byte_pairs(folder: Path) -> tuple[Path, BytePairs, list[AddedTokenEntry]]:
    """Returns the file with the ids, what it says, and the tokens that were added after CLIP's training."""
    vocab, merges, both = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    missing = [path.name for path in (vocab, merges) if not path.exists()]
    if not missing:
        # The first line is the version, and "#" also begins a merge; a text with "\r" keeps its other characters.
        lines = read_text(merges, MOST_BYTES, EXPECTED).split("\n")
        pairs = BytePairs(
            read_record(vocab, dict[str, TokenId], EXPECTED),
            [line.strip(" \t\r") for line in lines if line.strip() and not line.startswith("#version")],
        )
        later = folder / "added_tokens.json"
        added = read_record(later, dict[str, TokenId], EXPECTED) if later.exists() else {}
        return vocab, pairs, [AddedTokenEntry(text, special=False, id=number) for text, number in added.items()]
    if not both.exists():
        raise UserError(f"{folder}: no {' and no '.join(missing)}, nor tokenizer.json; {EXPECTED}")
    file = read_record(both, TokenizerFile, EXPECTED)
    return both, file.model, file.added_tokens


def check_byte_pairs(path: Path, pairs: BytePairs) -> list[tuple[str, str]]:
    """Returns the merges. Raises UserError if the ids do not count from 0, or for merges of unknown parts."""
    if not pairs.vocab or sorted(pairs.vocab.values()) != list(range(len(pairs.vocab))):
        raise UserError(f"{path}: its token ids are not 0, 1, ... to the last one, each once; {EXPECTED}")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in pairs.merges]
    bad = [merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= pairs.vocab.keys()]
    if bad:
        raise UserError(
            f"{merges_file(path)}: merges that it has no tokens for: {listed(map(' '.join, bad))}; {EXPECTED}"
        )
    # A file that was copied in part would give other tokens without a word.
    made = {"".join(merge) for merge in merges}
    unmade = [token for token in pairs.vocab if len(token.removesuffix("</w>")) > 1 and token not in made]
    if lost := [token for token in unmade if not SPECIAL.fullmatch(token)]:
        raise UserError(f"{merges_file(path)}: lacks the merges of the tokens {listed(lost)}; {EXPECTED}")
    return [(merge[0], merge[1]) for merge in merges]


def merges_file(path: Path) -> Path:
    """Returns the file with the merges, given the one with the ids."""
    return path.with_name("merges.txt") if path.name == "vocab.json" else path


def special_tokens(settings: TokenizerSettings, special: SpecialTokens) -> dict[str, AddedTokenEntry]:
    """The tokens for a prompt's start, end and padding. transformers' order: which file wins, if they differ."""
    # Since transformers 4.34 everything is in tokenizer_config.json, which then has added_tokens_decoder.
    files = (special, settings) if settings.added_tokens_decoder is not None else (settings, special)
    named: dict[str, NamedToken] = {name: "<|endoftext|>" for name in NAMES}
    named["bos_token"] = "<|startoftext|>"
    for file in files:
        named |= {name: value for name in NAMES if (value := getattr(file, name)) is not None}
    tokens = {}
    for name, value in named.items():
        token = AddedTokenEntry(value, normalized=False) if isinstance(value, str) else value
        tokens[name] = replace(token, id=None, special=True)
    return tokens


def check_added(path: Path, ids: dict[str, int], added: list[AddedTokenEntry]) -> list[AddedTokenEntry]:
    """Returns the added tokens in the order of their ids. Raises UserError if these do not follow the vocabulary's."""
    found: dict[str, AddedTokenEntry] = {}
    by_text = dict(ids)
    for token in added:
        number = by_text.setdefault(token.content, -1 if token.id is None else token.id)
        if number < 0 or token.id not in (None, number):
            raise UserError(f"{path}: no id, or two, for the token {token.content!r}; {EXPECTED}")
        found[token.content] = replace(token, id=number)
    later = sorted(by_text[text] for text in by_text.keys() - ids.keys())
    if len(found) > MOST_ADDED or later != list(range(len(ids), len(by_text))):
        raise UserError(f"{path}: the ids of added tokens do not follow the last one; {EXPECTED}")
    return sorted(found.values(), key=lambda token: by_text[token.content])


def checked_length(path: Path, length: int | float | None) -> int:
    """Returns the tokens of a prompt. Raises UserError unless it is a whole number with room for a word."""
    if length is None or length >= UNLIMITED:
        return DEFAULT_LENGTH
    if length != int(length) or not 3 <= length <= MOST_TOKENS:
        raise UserError(f"{path}: model_max_length={length}: expected a whole number of tokens from 3 on; {EXPECTED}")
    return int(length)
