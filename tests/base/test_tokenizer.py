"""The class word among a prompt's tokens."""

import pytest

from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.base.words import find_word
from catversion_jax.utils.errors import UserError
from tests import tiny


def place(tokenizer, prompt, word) -> int:
    return int(find_word(tokenizer, tokenizer([prompt]), word)[0])


@pytest.mark.parametrize(
    ("prompt", "word", "last_token"),
    [
        ("a photo of a teapot", "teapot", "teapot"),
        ("A Photo Of A TEAPOT on the beach", "teapot", "teapot"),
        ("a teapot and a teapot", "Teapot", "teapot"),
        ("a photo of a teddy bear in the snow", "teddy bear", "bear"),
    ],
)
def test_found_at_its_last_token(mini, prompt, word, last_token):
    tokens = mini.tokenizer([prompt])[0]
    expected = list(tokens).index(mini.tokenizer.word(last_token)[-1])
    assert place(mini.tokenizer, prompt, word) == expected


@pytest.mark.parametrize("prompt", ["a photo of a car", "two teapots", "tea pot", ""])
def test_not_found(mini, prompt):
    assert place(mini.tokenizer, prompt, "teapot") == -1


def test_long_prompts_are_cut(mini):
    long = "a photo of a teapot " * 30
    assert mini.tokenizer([long]).shape == (1, 77)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no vocab\.json and no merges\.txt"):
        Tokenizer(tmp_path)


def test_model_without_parts(tmp_path):
    with pytest.raises(UserError, match="nowhere: not found; expected a folder"):
        tiny.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no text_encoder/config\.json"):
        tiny.load(tmp_path)
