"""Values of flags that cannot work, and files of prompts as people have them."""

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest

from catversion_jax.cli import flags
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_model import model_of
from catversion_jax.utils.errors import UserError
from catversion_jax.weights import hub
from tests import tiny
from tests.commands import error_of


@pytest.fixture
def concept(tmp_path):
    path = tmp_path / "concept.safetensors"
    concept_file.save(path, tiny.concept(np.zeros((1, 3, 2, 2, 16), np.float32), "0123"))
    return path


def prompts(path=None, *given: str) -> list[str]:
    return flags.given_prompts(SimpleNamespace(prompt=list(given), prompts_file=path and str(path)))


@pytest.mark.parametrize(
    "data",
    [
        b"a teapot\na car\n",
        b"\xef\xbb\xbfa teapot\n\xef\xbb\xbfa car\n",
        b"\xef\xbb\xbfa teapot\r\na car",
        b"\n a teapot \n\na car\na car",
    ],
)
def test_a_file_of_prompts(tmp_path, data):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    assert prompts(path) == ["a teapot", "a car"]


def test_files_that_are_no_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein Teekännchen".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompts\.txt: not UTF-8 at byte 8; --prompts_file takes a text file"):
        prompts(path)
    path.write_bytes(b"a\n" * 2**20)
    with pytest.raises(UserError, match=r"prompts\.txt: larger than 1 MiB"):
        prompts(path)
    path.write_text("".join(f"a teapot {i}\n" for i in range(flags.MAX_PROMPTS + 1)))
    with pytest.raises(UserError, match="10001 prompts; expected at most 10000"):
        prompts(path)
    path.write_text('"' * 10_000)
    with pytest.raises(UserError, match="10000 characters; expected at most 4096"):
        prompts(path)
    for prompt in ("a\0b", "a \udcff"):  # the second: a byte of the command line that is not UTF-8
        with pytest.raises(UserError, match="NUL or half of a character"):
            prompts(None, prompt)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for other in (pipe, "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="--prompts_file takes a text file"):
            prompts(other)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--guidance=nan", "--guidance=nan: expected 0 to 100"),
        ("--guidance=inf", "--guidance=inf: expected 0 to 100"),
        ("--guidance=1e30", "--guidance=1e+30: expected 0 to 100"),
        ("--guidance=-1", "--guidance=-1.0: expected 0 to 100"),
        ("--strength=nan", "--strength=nan: expected 0 (the base model) to 2; 1 is as trained"),
        ("--strength=-0.1", "--strength=-0.1: expected 0"),
        ("--strength=2.5", "--strength=2.5: expected 0"),
        ("--batch_size=0", "batch_size"),
        ("--batch_size=100000", "--batch_size=100000: expected 1 to 1024"),
        ("--out=", "--out: empty; expected a folder"),
        ("--embedding=", "--embedding: missing"),
        ("--steps=0", "steps"),
        ("--num=200000000", "num"),
        ("--num=0", "num"),
        ("--seed=-1", "seed"),
        ("--scheduler=best", "--scheduler=best: expected one of"),
    ],
)
def test_values_that_cannot_work(concept, tmp_path, flag, message):
    out = tmp_path / "out"
    assert message in error_of("generate", f"--embedding={concept}", "--prompt=a teapot", f"--out={out}", flag)
    assert not out.exists()


def test_a_second_embedding(concept, tmp_path):
    """Is used, or refused, and never left out."""
    twice = [f"--embedding={concept}", f"--concept={concept}", f"--out={tmp_path / 'out'}", "--prompt=a teapot"]
    assert f"--embedding: {concept} twice; expected each concept once" in error_of("generate", *twice)
    assert "twice; expected each concept once" in error_of("export", *twice)
    references = f"--references={tmp_path}"
    assert "expected one; only generate and export take several" in error_of("evaluate", *twice, references)


def test_a_strangers_concept_contacts_nobody(concept, tmp_path, monkeypatch):
    """The model that it names is used if the person has it, and else named, not downloaded."""
    of_hub = dataclasses.replace(concept_file.load(concept), model_path="stranger/model", model_revision="abc")
    concept_file.save(concept, of_hub)
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("downloads"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = error_of("generate", f"--embedding={concept}", "--prompt=a teapot", f"--out={tmp_path / 'out'}")
    assert f"{concept}: learned on stranger/model of https://huggingface.co, which is not in the cache" in message
    assert "to download it, say --model=stranger/model" in message
    monkeypatch.setattr(hub, "is_cached", lambda *asked: asked == ("stranger/model", "abc"))
    assert model_of({"c": of_hub}).path == "stranger/model"
    assert model_of({"c": of_hub}, "other/model").path == "other/model"
