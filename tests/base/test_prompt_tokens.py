"""Prompts of any length, with weights. Their numbers against ComfyUI are in tests/parity/test_comfyui.py."""

import numpy as np
import pytest

from catversion_jax.base import prompt_tokens
from catversion_jax.base.pipeline import MINI
from catversion_jax.base.prompt_tokens import PromptTokens, prompts_without, read_prompt, word_weights
from catversion_jax.base.prompt_weights import weighted_parts
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.utils.errors import UserError

FILL = "photo " * 74


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MINI / "tokenizer")


def text_of(tokenizer: Tokenizer, prompt: PromptTokens) -> list[str]:
    return [
        " ".join(tokenizer.token(int(i)) for i in row[own]) for row, own in zip(prompt.ids, prompt.is_text, strict=True)
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a teapot", [("a teapot", 1.0)]),
        ("a (red:1.3) teapot", [("a ", 1.0), ("red", 1.3), (" teapot", 1.0)]),
        ("((red) teapot)", [("red", 1.21), (" teapot", 1.1)]),
        ("((red:0.5) teapot)", [("red", 0.5), (" teapot", 1.1)]),
        (r"\(c\) (a \) b:2)", [("(c) ", 1.0), ("a ) b", 2.0)]),
        ("(red:x) (:2)", [("red:x", 1.1), (" ", 1.0), (":2", 1.1)]),
        ("a) (b:2) (c", [("a) (b:2) (c", 1.0)]),
        ("", []),
    ],
)
def test_weighted_parts(prompt, expected):
    parts = weighted_parts(prompt)
    assert [text for text, _ in parts] == [text for text, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])


def test_parentheses_without_end():
    """Of any number; nested ones have a limit."""
    assert weighted_parts("(" * 2000 + "a") == (("(" * 2000 + "a", 1.0),)
    assert weighted_parts("(" * 90 + "a:0.5" + ")" * 90) == (("a", 0.5),)
    with pytest.raises(UserError, match="more than 100 parentheses in each other; expected fewer"):
        weighted_parts("(" * 4900 + "a:0.5" + ")" * 4900)
    for number in ("nan", "inf", "-1e999", "1e39", "1001"):
        with pytest.raises(UserError, match=r"the weight of 'red' is .*; expected at most 1000"):
            weighted_parts(f"a (red:{number}) teapot")


def test_chunks(tokenizer):
    """A long part goes over into the next chunk; a short one with its own weight begins it."""
    short = read_prompt(tokenizer, "a teapot")
    np.testing.assert_array_equal(short.ids, tokenizer(["a teapot"]))
    assert short.is_text.sum() == len(tokenizer.word("a teapot"))
    divided = read_prompt(tokenizer, FILL + "a teapot")
    assert divided.ids.shape == (2, 77)
    assert text_of(tokenizer, divided)[1] == "teapot"
    together = read_prompt(tokenizer, FILL + "(a teapot:1.2)")
    assert text_of(tokenizer, together)[1] == "a teapot"
    assert together.weights[1, :4].tolist() == pytest.approx([1, 1.2, 1.2, 1])
    assert together.ids[0, -2:].tolist() == [tokenizer.end, tokenizer.end]
    assert read_prompt(tokenizer, "").ids.shape == (1, 77)


def test_the_word_in_whichever_chunk(tokenizer):
    """Also one that goes over into the next; only as a whole word, though its last token begins a chunk."""
    size = len(tokenizer.word("teddy bear"))
    assert size > 1
    for before in (0, 73, 74, 75, 76, 149):
        prompt = read_prompt(tokenizer, "photo " * before + "teddy bear")
        ((places),) = np.argwhere(prompt.ends_of(tokenizer, ["teddy bear"])[0]).tolist()
        chunk, place = divmod(before + size - 1, 75)
        assert places == [chunk, 1 + place]
    hotdog = tokenizer.word("hotdog")
    assert hotdog[-1:] == tokenizer.word("dog")
    divided = read_prompt(tokenizer, "photo " * (76 - len(hotdog)) + "hotdog")
    assert divided.ids[1, 1] == tokenizer.word("dog")[0]
    assert not divided.ends_of(tokenizer, ["dog"]).any()
    prompts = [FILL + "a teapot", FILL + "a car", "(teapot:0.3)"]
    assert prompts_without([tokenizer], ["teapot", ""], prompts) == [[prompts[1]], prompts]


def test_the_identifier_in_whichever_chunk(tokenizer):
    """It has the class word's weight, and is there once."""
    identifier = tokenizer.word("sks")
    for prompt in ("a (teapot:1.5)", "a (sks teapot:1.5)", FILL + "a (teapot:1.5)"):
        read = read_prompt(tokenizer, prompt, "teapot", "sks")
        weighted = read.ids[read.weights == 1.5]
        assert tuple(weighted) == (*identifier, *tokenizer.word("teapot"))
    np.testing.assert_array_equal(read_prompt(tokenizer, "a car", "teapot", "sks").ids, tokenizer(["a car"]))


def test_word_weights(tokenizer):
    """The first occurrence of each, and none of one that belongs to a longer word."""
    prompts = [
        read_prompt(tokenizer, f"{FILL}{text}") for text in ("a teapot and a dog", "a dog and a dog", "teddy bear")
    ]
    weights = word_weights(tokenizer, prompts, ["teapot", "dog", "bear", "teddy bear"])
    assert weights.sum(-1).round(6).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]
    for word, of_word, prompt in ((0, "teapot", 0), (1, "dog", 1), (3, "teddy bear", 2)):
        ids = prompts[prompt].ids.ravel()[weights[word, prompt] > 0]
        assert tuple(ids) == tokenizer.word(of_word)


def test_a_tokenizer_shorter_than_a_part(tokenizer, monkeypatch):
    """A part that no chunk could hold is divided."""
    monkeypatch.setattr(prompt_tokens, "WHOLE", 50)
    chunks = prompt_tokens.in_chunks([(tuple(range(7)), 1.0), ((9, 9), 2.0)], 3)
    assert [[token for token, _ in chunk] for chunk in chunks] == [[0, 1, 2], [3, 4, 5], [6, 9, 9]]
