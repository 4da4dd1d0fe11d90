"""The tokenizer's files: the same ids from each layout, those of transformers; what is none is refused in one line."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from catversion_jax.base.pipeline import MINI
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.utils.errors import UserError

OLD, NEW = ("vocab.json", "merges.txt"), ("tokenizer.json",)
CAT = {"content": "<cat>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def prompts() -> list[str]:
    rng = random.Random(0)
    odd = [
        "", " ", "A PHOTO  of a Teapot!", "it's John's, they're 12345 & 3.5", "<|endoftext|> a <|startoftext|>b",
        "<|ENDOFTEXT|>", "café cafe\u0301", "日本語 テスト", "😀\u200d", "\t\n a\r\nb\x00c", "a" * 500, "word " * 200,
        "!!! wow !", "\u2028x", "İstanbul ẞ", "x <cat>y <CAT>",
    ]  # fmt: skip
    ranges = [(32, 127), (32, 127), (0xA0, 0x3000), (0x1F300, 0x1F700)]
    return odd + ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60))) for _ in range(80)]


def write(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> Path:
    """The mini model's tokenizer without the files of `drop`; `changes` are values of tokenizer_config.json."""
    shutil.copytree(MINI / "tokenizer", folder)
    for name in drop:
        (folder / name).unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("drop", "changes", "files"),
    [
        ((), {}, {}),
        (OLD, {}, {}),  # as transformers 5 saves it
        (NEW, {}, {}),
        (NEW, {"pad_token": "!"}, {}),
        (NEW, {}, {"special_tokens_map.json": {"pad_token": CAT | {"content": "!"}}}),
        (NEW, {}, {"added_tokens.json": {"<cat>": 1584, "<dog>": 1585}}),
        (NEW, {"added_tokens_decoder": {"1584": CAT | {"special": False}}}, {}),
        (NEW, {"added_tokens_decoder": {}, "pad_token": "!"}, {"special_tokens_map.json": {"pad_token": "a"}}),
    ],
)
def test_the_ids_are_those_of_transformers(tmp_path, drop, changes, files):
    folder = write(tmp_path / "tokenizer", drop, **changes)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    theirs, ours = CLIPTokenizer.from_pretrained(str(folder)), Tokenizer(folder)
    expected = theirs(prompts(), padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(ours(prompts()), expected)
    for prompt in prompts():
        assert list(ours.word(prompt)) == theirs(prompt, add_special_tokens=False)["input_ids"]


def test_what_transformers_5_saves(tmp_path):
    """tokenizer.json alone, with a token of a user's own; merges are pairs there, and were lines before."""
    theirs = CLIPTokenizer.from_pretrained(str(MINI / "tokenizer"))
    theirs.add_tokens(["<cat>"])
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    expected = theirs(prompts(), padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(Tokenizer(tmp_path)(prompts()), expected)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["model"]["merges"] = [" ".join(merge) for merge in file["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    np.testing.assert_array_equal(Tokenizer(tmp_path)(prompts()), expected)


def test_byte_order_marks(tmp_path):
    folder = write(tmp_path / "tokenizer", NEW)
    expected = Tokenizer(folder)(prompts())
    for name in (*OLD, "tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    np.testing.assert_array_equal(Tokenizer(folder)(prompts()), expected)


@pytest.mark.parametrize("length", [None, 1e30, 1000000000000000019884624838656, 77, 77.0])
def test_lengths_that_mean_77(tmp_path, length):
    tokenizer = Tokenizer(write(tmp_path / "tokenizer", model_max_length=length))
    assert tokenizer(["a " * 90]).shape == (1, 77)


def test_no_length_and_no_config(tmp_path):
    folder = write(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text("{}")
    assert Tokenizer(folder).length == 77
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).length == 77


def test_a_word_of_many_tokens(mini):
    """Longer than a prompt: its tokens are all given, and a prompt of it is cut."""
    word = "x y " * 45
    assert len(mini.tokenizer.word(word)) == 90
    assert mini.tokenizer([word])[0, -1] == 1583


def test_half_of_a_character(mini):
    with pytest.raises(UserError, match="half of a character; write the prompt in UTF-8"):
        mini.tokenizer(["a \udce9"])


WRONG_CONFIGS = {
    '{"model_max_length": "77"}': "Expected `int | float | null`, got `str`",
    '{"model_max_length": [77]}': "Expected `int | float | null`, got `array`",
    '{"model_max_length": -1}': "model_max_length=-1: expected a whole number of tokens from 3 on",
    '{"model_max_length": 2}': "model_max_length=2: expected",
    '{"model_max_length": 77.5}': "model_max_length=77.5: expected",
    '{"model_max_length": NaN}': "not JSON",
    '{"pad_token": 3}': "pad_token",
    '{"pad_token": "<none>"}': "no id, or two, for the token '<none>'",
    '{"pad_token": "\\ud800"}': "not JSON",
    '{"added_tokens_decoder": {"x": {"content": "<y>"}}}': "added_tokens_decoder",
    '{"added_tokens_decoder": {"9000": {"content": "<y>"}}}': "do not follow the last one",
    "[]": "Expected `object`, got `array`",
    "": "not JSON",
    '{"x": ' + "[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("text", WRONG_CONFIGS, ids=lambda text: text[:40])
def test_configs_that_are_refused(tmp_path, text):
    folder = write(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text(text)
    refused(folder, WRONG_CONFIGS[text])


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        Tokenizer(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def vocab(**changes: object) -> str:
    return json.dumps(json.loads((MINI / "tokenizer" / "vocab.json").read_text()) | changes)


WRONG_FILES = {
    ("vocab.json", vocab(a=-1)): "Expected `int` >= 0",
    ("vocab.json", vocab(a=0)): "its token ids are not 0, 1, ...",
    ("vocab.json", vocab(new=2_000_000)): "Expected `int` <= 1048575",
    ("vocab.json", vocab(a=None)): "got `null`",
    ("vocab.json", vocab(a=[1])): "got `array`",
    ("vocab.json", "{}"): "its token ids are not 0, 1, ...",
    ("vocab.json", "[]"): "Expected `object`, got `array`",
    ("vocab.json", ""): "not JSON",
    ("vocab.json", '{"a": 0}'): "merges that it has no tokens for: ",
    ("vocab.json", '{"\\ud800": 0}'): "not JSON",
    ("merges.txt", "a b c"): "merges that it has no tokens for: a b c; expected",
    ("merges.txt", "ab"): "merges that it has no tokens for: ab",
    ("merges.txt", "zzz yyy"): "merges that it has no tokens for: zzz yyy",
    ("added_tokens.json", '{"<cat>": 7}'): "do not follow the last one",
    ("added_tokens.json", '{"a": 7}'): "no id, or two, for the token 'a'",
    ("special_tokens_map.json", '{"bos_token": ["a"]}'): "bos_token",
    ("tokenizer.json", "{}"): "missing required field `model`",
    ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": {}, "merges": []}, "added_tokens": []}'): "'Unigram'",
}


@pytest.mark.parametrize(("name", "text"), WRONG_FILES, ids=lambda text: text[:30])
def test_files_that_are_refused(tmp_path, name, text):
    folder = write(tmp_path / "tokenizer", OLD if name in NEW else NEW)
    (folder / name).write_text(text)
    refused(folder, WRONG_FILES[name, text])


def test_files_that_are_no_text_or_no_files(tmp_path):
    folder = write(tmp_path / "tokenizer", NEW)
    (folder / "merges.txt").write_bytes(b"\xff\xfe")
    refused(folder, "merges.txt: not UTF-8 at byte 0")
    (folder / "merges.txt").unlink()
    os.mkfifo(folder / "merges.txt")
    refused(folder, "merges.txt: not a regular file")


@pytest.mark.parametrize("kept", [0, 1, 300, -1])
def test_merges_that_were_copied_in_part(tmp_path, kept):
    """Words would be other tokens, without a word."""
    folder = write(tmp_path / "tokenizer", NEW)
    lines = (folder / "merges.txt").read_text().splitlines(True)
    (folder / "merges.txt").write_text("".join(lines[:kept]))
    with pytest.raises(UserError, match=r"merges\.txt: lacks the merges of the tokens "):
        Tokenizer(folder)


def test_spaces_at_the_ends_of_merges(tmp_path):
    folder = write(tmp_path / "tokenizer", NEW)
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("".join(f"{line} \r\n" for line in lines))
    np.testing.assert_array_equal(Tokenizer(folder)(["a photo"]), Tokenizer(MINI / "tokenizer")(["a photo"]))
