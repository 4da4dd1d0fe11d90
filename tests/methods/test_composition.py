"""Several concepts in one prompt: each from its own word on, and nothing where there is no word of theirs."""

import dataclasses

import numpy as np
import pytest

from catversion_jax.methods import concept_file
from catversion_jax.methods.composition import compose
from catversion_jax.methods.concept_model import warnings
from catversion_jax.sampling import conditioning
from catversion_jax.utils.errors import UserError
from tests import tiny
from tests.commands import catversion, error_of
from tests.conftest import max_error


@pytest.fixture(scope="module")
def concepts(tiny_model, tiny_pipeline) -> list[concept_file.Concept]:
    """A teapot and a dog."""
    rng = np.random.default_rng(0)
    prefixes = [3 * rng.normal(size=(length, 3, 2, 2, 16)).astype(np.float32) for length in (2, 1)]
    teapot, dog = (tiny.concept(prefix, tiny_pipeline.fingerprint, tiny_model) for prefix in prefixes)
    return [teapot, dataclasses.replace(dog, class_word="dog")]


def states(pipeline, prompt: str, concepts=(), strength: float = 1.0) -> np.ndarray:
    return np.asarray(conditioning.condition(pipeline, [prompt], tiny.personal(*concepts, strength=strength)).states[0])


def triggered(concept: concept_file.Concept) -> concept_file.Concept:
    return dataclasses.replace(concept, method=dataclasses.replace(concept.method, scope="trigger"))


def test_each_acts_from_its_own_word_on(tiny_pipeline, concepts):
    prompt = "a photo of a teapot and a dog"
    teapot, dog = (tiny_pipeline.tokenizer([prompt])[0].tolist().index(tiny_pipeline.tokenizer.word(word)[0])
                   for word in ("teapot", "dog"))  # fmt: skip
    together, base = states(tiny_pipeline, prompt, concepts), states(tiny_pipeline, prompt)
    alone = states(tiny_pipeline, prompt, [triggered(concepts[0])])
    assert max_error(together[:teapot], base[:teapot]) < 1e-5
    assert max_error(together[teapot:dog], alone[teapot:dog]) < 1e-5
    assert np.abs(alone[teapot:dog] - base[teapot:dog]).max(-1).min() > 0.01
    assert np.abs(together[dog:] - alone[dog:]).max(-1).min() > 0.01
    np.testing.assert_allclose(states(tiny_pipeline, prompt, concepts[::-1]), together, atol=1e-5)


def test_one_of_two_words(tiny_pipeline, concepts):
    """As if the other concept were not there; with neither, bit for bit the base model."""
    for concept, prompt in zip(concepts, ("a teapot in the snow", "a dog in the snow"), strict=True):
        both, one = (states(tiny_pipeline, prompt, c) for c in (concepts, [triggered(concept)]))
        assert max_error(both, one) < 1e-5
    np.testing.assert_array_equal(states(tiny_pipeline, "a car", concepts), states(tiny_pipeline, "a car"))


def test_refused(concepts):
    teapot, dog = concepts
    with pytest.raises(UserError, match=r"class words \['teapot', 'teapot'\]: expected another one for each"):
        compose([teapot, dataclasses.replace(dog, class_word="Teapot")])
    with pytest.raises(UserError, match=r"class words \['teapot', ''\]"):
        compose([teapot, dataclasses.replace(dog, class_word="")])
    for changes in ({"layers": ((0, 1, 2),)}, {"logit_bias": 1.0}):
        other = dataclasses.replace(dog, method=dataclasses.replace(dog.method, **changes))
        with pytest.raises(UserError, match="the concepts of teapot, dog: cannot share a prompt"):
            compose([teapot, other])
    other = dataclasses.replace(dog, learned={"prefix": dog.learned["prefix"][..., :8]})  # of another base model
    with pytest.raises(UserError, match="cannot share a prompt; expected all by method catversion, of one base model"):
        compose([teapot, other])


def test_generate(tmp_path, concepts):
    paths = [tmp_path / f"{concept.class_word}.safetensors" for concept in concepts]
    for path, concept in zip(paths, concepts, strict=True):
        tiny.save_run(path, concept)
    same = ["generate", *(f"--embedding={path}" for path in paths), f"--out={tmp_path / 'out'}"]
    done = catversion(*same, "--prompt=a teapot and a dog", "--num=1", "--steps=1")
    assert "catversion: warning" not in done.stderr
    assert (tmp_path / "out" / "a-teapot-and-a-dog_0.png").is_file()
    done = catversion(*same, "--check", "--prompt=a dog", "--prompt=a car")
    moved, still = done.stdout.splitlines()
    assert "without the class word 'dog', which the concept was learned with: 'a car'" in done.stderr
    assert moved.startswith("'a dog': moved by")
    assert still == "'a car': nothing moved"
    concept_file.save(paths[1], concepts[0])
    assert "expected another one for each concept of a prompt" in error_of(*same, "--prompt=a teapot")


def test_a_word_within_a_word(tiny_pipeline, concepts):
    """ "mug" has no place of its own in "a coffee mug" if both are looked for, and that is told."""
    mug, coffee = (dataclasses.replace(c, class_word=w) for c, w in zip(concepts, ("mug", "coffee mug"), strict=True))
    prompts = ["a coffee mug", "a mug and a coffee mug"]
    (line,) = warnings(tiny_pipeline, prompts, tiny.personal(mug, coffee))
    assert line == "without the class word 'mug', which the concept was learned with: 'a coffee mug'"
