"""Words among a prompt's tokens: whole words, each its own, however they are written."""

import json
import unicodedata

import numpy as np
import pytest
from transformers import CLIPTokenizer

from catversion_jax.base.pipeline import MINI
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import find_word, find_words, put_before, without_word

WORDS = ["a", "photo", "of", "the", "can", "bat", "mug", "coffee", "teapot", "sks", "toucan", "wombat", "café", "cat"]
MERGED = ["can", "bat", "mug", "teapot", "sks", "coffee", "cat"]
"""Words that are one token. "toucan" and "wombat" are several, whose last one is "can" and "bat"."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A byte-pair tokenizer as CLIP's, in which long words end in the tokens of short ones."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789'-.,") | {"Ã", "©"})
    vocabulary, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in MERGED:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # from the end, so that the merge is also made at the end of longer words
            merges.append(f"{parts[-2]} {parts[-1]}")
            parts[-2:] = ["".join(parts[-2:])]
            vocabulary.append(parts[-1])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return Tokenizer(folder)


def words_of(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """The words of a prompt as the tokenizer sees them, the tokens of each joined."""
    text = "".join(map(tokenizer._encoder.id_to_token, tokenizer.word(prompt)))
    return text.split("</w>")[:-1]


def found_word(tokenizer: Tokenizer, prompt: str, *words: str) -> list[int]:
    """The index, among the prompt's words, of each word's last one; -1 without it."""
    ids = tokenizer([prompt])
    ends = np.cumsum(tokenizer.ends_word[ids[0]]) - 2  # the start token counts as a word
    return [int(ends[last[0]]) if last[0] >= 0 else -1 for last in find_words(tokenizer, ids, words)]


def test_the_tokenizer_is_as_it_should_be(tokenizer):
    assert tokenizer.word("toucan")[-1:] == tokenizer.word("can")
    assert tokenizer.word("wombat")[-1:] == tokenizer.word("bat")
    assert words_of(tokenizer, "a toucan") == ["a", "toucan"]


@pytest.mark.parametrize(
    ("prompt", "word", "index"),
    [
        ("a toucan", "can", -1),
        ("a toucan and a can", "can", 4),
        ("a wombat", "bat", -1),
        ("a cat-can", "can", 3),
        ("can", "can", 0),
        ("a teapot  of mug", "teapot ", 1),
        ("a teapot", "  TeaPot", 1),
        ("a coffee   mug", "coffee mug", 2),
        ("a coffee mug", "coffee  mug", 2),
        ("a coffee can", "coffee mug", -1),
        (unicodedata.normalize("NFD", "a café"), "café", 1),
        ("a café", unicodedata.normalize("NFD", "café"), 1),
        ("a cats", "cat", -1),
        ("a teapot", "", -1),
        ("a teapot", "   ", -1),
        ("a teapot", "猫", -1),  # no tokens of its own
        ("a 猫", "猫", -1),
        ("a teapot", "teapot " * 90, -1),
        ("", "teapot", -1),
    ],
)
def test_whole_words(tokenizer, prompt, word, index):
    assert found_word(tokenizer, prompt, word) == [index]


@pytest.mark.parametrize(
    ("prompt", "mug", "coffee_mug"),
    [
        ("a coffee mug and a mug", 5, 2),
        ("a mug and a coffee mug", 1, 5),
        ("a coffee mug", -1, 2),
        ("a mug", 1, -1),
        ("a coffee mug and a coffee mug", -1, 2),
    ],
)
def test_words_of_words(tokenizer, prompt, mug, coffee_mug):
    assert found_word(tokenizer, prompt, "mug", "coffee mug") == [mug, coffee_mug]
    assert found_word(tokenizer, prompt, "coffee mug", "mug") == [coffee_mug, mug]


@pytest.mark.parametrize(
    ("prompt", "class_word", "expected"),
    [
        ("a teapot", "teapot", "a sks teapot"),
        ("a sks teapot", "teapot", "a sks teapot"),
        ("a Teapot and a teapot", " teapot ", "a sks teapot and a teapot"),
        ("a coffee  mug", "coffee mug", "a sks coffee mug"),
        ("a coffee mug", "coffee  mug ", "a sks coffee mug"),
        (unicodedata.normalize("NFD", "a café"), "café", "a sks café"),
        ("a toucan", "can", "a toucan"),
        ("teapot", "teapot", "sks teapot"),
        ("", "teapot", ""),
    ],
)
def test_the_identifier(tokenizer, prompt, class_word, expected):
    assert put_before(tokenizer, tokenizer.word(prompt), class_word, "sks") == tokenizer.word(expected)


def test_prompts_without_the_word(tokenizer):
    cut = "a photo of " * 30 + "teapot"
    prompts = ["a teapot", "a toucan", cut]
    assert without_word([tokenizer], "teapot", prompts) == prompts[1:]
    assert without_word([tokenizer], "", prompts) == prompts


def test_each_text_encoder_has_its_own_words(tokenizer, mini):
    """SDXL's second tokenizer may lack a word that the first one has."""
    prompt = "a 猫 teapot"
    assert without_word([tokenizer, mini.tokenizer], "teapot", [prompt]) == []
    held = [find_word(t, t(["a wombat"]), "wombat")[0] for t in (tokenizer, mini.tokenizer)]
    assert min(held) > 0
    assert without_word([tokenizer, mini.tokenizer], "猫", [prompt]) == [prompt]


@pytest.mark.parametrize("prompt", ["", "a teapot", "a photo of a teapot on the beach " * 20, "A  Café, at 5 o'clock."])
def test_fit_is_as_the_library_pads(mini, prompt):
    theirs = CLIPTokenizer.from_pretrained(str(MINI / "tokenizer"))
    expected = theirs([prompt], padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(mini.tokenizer([prompt]), expected)
