"""Textual Inversion embeddings of other programs as concepts; what they do is tested against diffusers and ComfyUI in
tests/parity/test_other_files.py."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from catversion_jax.base.prompt_tokens import read_prompt
from catversion_jax.methods import concept_file
from catversion_jax.methods.textual_inversion import TextualInversion
from catversion_jax.sampling import conditioning
from catversion_jax.utils.errors import UserError
from tests import torch_files
from tests.commands import catversion, error_of

VECTORS = np.random.default_rng(0).normal(0, 0.1, (3, 32)).astype(np.float32)
CASES = Path(__file__).parents[2].parent / "shared" / "cases" / "concepts"


@pytest.mark.parametrize(
    ("tensors", "metadata", "word"),
    [
        ({"emb_params": VECTORS}, {}, "thing"),
        ({"emb_params": VECTORS.astype(np.float16)}, {"modelspec.title": "mug"}, "mug"),
        ({"<my-mug>": VECTORS}, {}, "<my-mug>"),
        ({"<my-mug>": VECTORS[0]}, {}, "<my-mug>"),
        ({"string_to_param.*": VECTORS}, {}, "thing"),
        ({"sks-toy": VECTORS}, {}, "sks-toy"),
        ({" ": VECTORS}, {}, "thing"),
        ({"clip_l": VECTORS, "clip_g": np.ones((3, 48), np.float32)}, {}, "thing"),
    ],
)
def test_safetensors(tmp_path, tensors, metadata, word):
    path = tmp_path / "thing.safetensors"
    save_file(tensors, path, metadata)
    concept = concept_file.load(path)
    assert concept.class_word == word
    assert concept.method == TextualInversion(vectors=len(concept.learned["word"]))
    assert sorted(concept.learned) == ["word", "word_2"][: len(tensors)]
    first = next(iter(tensors.values()))
    np.testing.assert_array_equal(concept.learned["word"], np.float32(first).reshape(-1, 32))
    concept.save(tmp_path / "ours.safetensors")
    again = concept_file.load(tmp_path / "ours.safetensors")
    assert (again.method, again.class_word, again.digest) == (concept.method, concept.class_word, concept.digest)


def test_files_of_torch(tmp_path):
    """Of AUTOMATIC1111's web UI and of diffusers; nothing is unpickled."""
    view = torch_files.whole("0", VECTORS)
    automatic = {"string_to_token": {"*": 265}, "string_to_param": {"*": view}, "name": "mug", "step": 500}
    for name, contents, word in (("a.pt", automatic, "mug"), ("learned_embeds.bin", {"<toy>": view}, "<toy>")):
        torch_files.save(tmp_path / name, contents, {"0": VECTORS})
        concept = concept_file.load(tmp_path / name)
        assert concept.class_word == word
        np.testing.assert_array_equal(concept.learned["word"], VECTORS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"foo": np.ones((2, 2, 2, 2), np.float32)}, r"an embedding of shape \[2, 2, 2, 2\]"),
        ({"<a>": VECTORS, "<b>": VECTORS}, "no embedding in it; expected vectors by a word"),
        ({"emb_params": np.ones((80, 32), np.float32)}, r"an embedding of shape \[80, 32\]; expected \[n, channels\]"),
        ({"emb_params": np.ones((2, 2, 32), np.float32)}, r"an embedding of shape \[2, 2, 32\]"),
        ({"emb_params": VECTORS * np.nan}, "holds NaN or infinity; download it again"),
        ({"clip_l": VECTORS, "clip_g": VECTORS[:2]}, r"\[3, 2\] vectors; expected as many for each text encoder"),
    ],
)
def test_refused(tmp_path, tensors, message):
    path = tmp_path / "thing.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        concept_file.load(path)


def test_vectors_in_the_place_of_the_word(tiny_pipeline):
    """Wherever it stands, with the words' weights; chunks are counted with them."""
    tokenizer = tiny_pipeline.tokenizer
    prompt = read_prompt(tokenizer, "a (<mug>:1.5) and a <mug>, a mug", "<mug>", "", 3)
    row = prompt.vector[0]
    assert row[row >= 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert prompt.weights[0][row >= 0].tolist() == [1.5] * 3 + [1.0] * 3
    assert prompt.is_text.sum() == len(tokenizer.word("a and a , a mug")) + 2 * 3
    assert (read_prompt(tokenizer, "a car", "<mug>", "", 3).vector == -1).all()
    long = read_prompt(tokenizer, "photo " * 73 + "<mug>", "<mug>", "", 3)
    assert [row[row >= 0].tolist() for row in long.vector] == [[0, 1], [2]]


def test_strength(tiny_pipeline, tmp_path):
    """Scales the way from the placeholder's embedding; at 0 the word's own tokens are the base model's."""
    save_file({"emb_params": VECTORS}, tmp_path / "thing.safetensors")
    concept = concept_file.load(tmp_path / "thing.safetensors")
    states = {
        strength: conditioning.context(tiny_pipeline, ["a thing"], concept.at(strength)).states
        for strength in (0.0, 0.5, 1.0)
    }
    base = conditioning.context(tiny_pipeline, ["a thing"]).states
    np.testing.assert_array_equal(states[0.0], base)
    assert np.abs(states[1.0] - states[0.5]).max() > 0.01
    half = dataclasses.replace(concept, method=TextualInversion(vectors=1), learned={"word": VECTORS[:1]})
    assert np.abs(conditioning.context(tiny_pipeline, ["a thing"], half).states - states[1.0]).max() > 0.01


def test_the_commands(tmp_path, tiny_model):
    """A prompt without the word is told; a base model of other channels is refused."""
    save_file({"emb_params": VECTORS}, tmp_path / "thing.safetensors")
    given = (f"--embedding={tmp_path / 'thing.safetensors'}", f"--model={tiny_model}", f"--out={tmp_path / 'out'}")
    few = ("--steps=1", "--num=1")
    done = catversion("generate", *given, "--prompt=a photo of thing", "--prompt=a car", *few)
    assert "without the class word 'thing'" in done.stderr
    assert len(list((tmp_path / "out").glob("a-*.png"))) == 2
    wide = tmp_path / "wide.safetensors"
    save_file({"emb_params": np.ones((2, 768), np.float32)}, wide)
    message = error_of("generate", f"--embedding={wide}", *given[1:], "--prompt=a wide", *few)
    assert "wide.safetensors: an embedding of 768 channels, but the text encoder has 32" in message
    if CASES.is_dir():
        assert concept_file.load(CASES / "kohya_ti.safetensors").class_word == "mug"
        assert concept_file.load(CASES / "a1111.safetensors").class_word == "a1111"
