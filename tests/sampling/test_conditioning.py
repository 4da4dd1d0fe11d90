"""How far a concept moves the text states: generate --check."""

import dataclasses

import numpy as np
import pytest

from catversion_jax.methods import concept_file
from catversion_jax.sampling import conditioning
from tests import tiny
from tests.commands import catversion, error_of


@pytest.fixture(scope="module")
def concept(tiny_model, tiny_pipeline) -> concept_file.Concept:
    prefix = np.random.default_rng(0).normal(size=(1, 2, 2, 2, 16)).astype(np.float32)
    fingerprint = tiny_pipeline.fingerprint
    return tiny.concept(prefix, fingerprint, tiny_model, layers=((2, 3),), scope="trigger")


def test_movement(tiny_pipeline, concept):
    prompts = ["a photo of a teapot", "a car"]
    moved, still = conditioning.movement(tiny_pipeline, prompts, concept)
    base, states = (conditioning.context(tiny_pipeline, prompts, *c).states[0] for c in ((), [concept]))
    change = np.linalg.norm(states - base) / np.linalg.norm(base)
    most = int(np.linalg.norm(states - base, axis=-1).argmax())
    assert most >= 5  # the class word: start, a, photo, of, a, teapot
    token = tiny_pipeline.tokenizer.token(int(tiny_pipeline.tokenizer(prompts)[0, most]))
    assert moved == f"'a photo of a teapot': moved by {change:.2%}, the most at token {most}, {token!r}"
    assert still == "'a car': nothing moved"
    for line in conditioning.movement(tiny_pipeline, prompts, concept.at(0.0)):
        assert line.endswith("nothing moved")
    everywhere = dataclasses.replace(concept, method=dataclasses.replace(concept.method, scope="all"))
    assert "moved by" in list(conditioning.movement(tiny_pipeline, prompts, everywhere.at(0.1)))[1]


def test_check(concept, tmp_path):
    """One line a prompt beside one warning for each reason; nothing is drawn."""
    path = tmp_path / "concept.safetensors"
    tiny.save_run(path, concept)
    same = ["generate", "--check", "--embedding", path, f"--out={tmp_path / 'out'}", "--prompt=a teapot"]
    (line,) = catversion(*same).stdout.splitlines()
    assert line.startswith("'a teapot': moved by ")
    done = catversion(*same, "--prompt=a car")
    first, second = done.stdout.splitlines()
    assert done.stderr.count("warning: without the class word 'teapot'") == 1
    assert first == line
    assert second == "'a car': nothing moved"
    done = catversion(*same, "--strength=0")
    assert "warning: strength=0 removes the concept" in done.stderr
    assert done.stdout == "'a teapot': nothing moved\n"
    other = tiny.write(tmp_path / "other", seed=1)
    assert "learned in text encoder" in error_of(*same, f"--model={other}")
    assert not (tmp_path / "out").exists()
