"""Several concepts in one prompt: which can share it, and where each one's word is."""

import dataclasses

import numpy as np
import pytest

from catversion_jax.base.prompt_tokens import read_prompt
from catversion_jax.methods import concept_file
from catversion_jax.methods.composition import check_composition, token_mask
from catversion_jax.methods.concept_model import warnings
from catversion_jax.methods.dreambooth import DreamBooth
from catversion_jax.methods.textual_inversion import TextualInversion
from catversion_jax.utils.errors import UserError
from tests import tiny
from tests.commands import catversion, error_of


@pytest.fixture(scope="module")
def concepts(tiny_model, tiny_pipeline) -> list[concept_file.Concept]:
    """A teapot and a dog, with prefixes of other lengths."""
    rng = np.random.default_rng(0)
    prefixes = [3 * rng.normal(size=(length, 3, 2, 2, 16)).astype(np.float32) for length in (2, 1)]
    how = {"model": tiny_model, "scope": "trigger"}
    teapot, dog = (tiny.concept(prefix, tiny_pipeline.fingerprint, **how) for prefix in prefixes)
    return [teapot, dataclasses.replace(dog, class_word="dog")]


def test_refused(concepts):
    teapot, dog = concepts
    with pytest.raises(UserError, match=r"class words \['teapot', 'teapot'\]: expected another one for each"):
        check_composition([teapot, dataclasses.replace(dog, class_word="Teapot")])
    with pytest.raises(UserError, match=r"class words \['teapot', ''\]"):
        check_composition([teapot, dataclasses.replace(dog, class_word="")])
    fine_tuned = dataclasses.replace(dog, method=DreamBooth("sks", 1.0))
    with pytest.raises(UserError, match="teapot, dog: cannot share a prompt, because dreambooth changes the UNet"):
        check_composition([teapot, fine_tuned])
    check_composition([fine_tuned])


def test_methods_that_leave_the_unet_alone_share_a_prompt(concepts):
    """In any layers, with any bias: each concept has text states of its own."""
    teapot, dog = concepts
    for changes in ({"layers": ((0, 1, 2),)}, {"logit_bias": 1.0}):
        check_composition([teapot, dataclasses.replace(dog, method=dataclasses.replace(dog.method, **changes))])
    check_composition([teapot, dataclasses.replace(dog, method=TextualInversion())])


def test_a_word_within_a_word(tiny_pipeline, concepts):
    """ "mug" has no place of its own in "a coffee mug" if both are looked for, and that is told."""
    mug, coffee = (dataclasses.replace(c, class_word=w) for c, w in zip(concepts, ("mug", "coffee mug"), strict=True))
    prompts = ["a coffee mug", "a mug and a coffee mug"]
    (line,) = warnings(tiny_pipeline, prompts, [mug, coffee])
    assert line == "without the class word 'mug', which the concept was learned with: 'a coffee mug'"
    tokenizer = tiny_pipeline.tokenizer
    read = [read_prompt(tokenizer, prompt) for prompt in prompts]
    beside, alone = ([token_mask(tokenizer, p, mug, others).any() for p in read] for others in ([coffee], []))
    assert beside == [False, True]
    assert alone == [True, True]


def test_beside_others_a_concept_needs_its_word(tiny_pipeline, concepts):
    """Whatever its scope: without its word it has no place in the image."""
    teapot, dog = concepts
    everywhere = dataclasses.replace(teapot, method=dataclasses.replace(teapot.method, scope="all"))
    tokenizer = tiny_pipeline.tokenizer
    car, both = (read_prompt(tokenizer, prompt) for prompt in ("a car", "a teapot and a dog"))
    assert token_mask(tokenizer, car, everywhere).all()
    assert not token_mask(tokenizer, car, everywhere, [dog]).any()
    assert token_mask(tokenizer, both, everywhere, [dog]).any()


def test_one_of_two_at_strength_0(tiny_pipeline, concepts):
    """It is left out, also of the words that the other one is told from."""
    mug, coffee = (dataclasses.replace(c, class_word=w) for c, w in zip(concepts, ("mug", "coffee mug"), strict=True))
    assert warnings(tiny_pipeline, ["a coffee mug"], [mug, coffee.at(0.0)]) == [
        "strength=0 removes the concept of 'coffee mug'"
    ]
    (line,) = warnings(tiny_pipeline, ["a mug"], [mug.at(0.0), coffee.at(0.0)][:1])
    assert line == "strength=0 removes the concept: what follows is the base model's"


def test_generate(tmp_path, concepts):
    paths = [tmp_path / f"{concept.class_word}.safetensors" for concept in concepts]
    for path, concept in zip(paths, concepts, strict=True):
        tiny.save_run(path, concept)
    same = ["generate", *(f"--embedding={path}" for path in paths), f"--out={tmp_path / 'out'}"]
    done = catversion(*same, "--prompt=a teapot and a dog", "--num=1", "--steps=1")
    assert "catversion: warning" not in done.stderr
    assert len([*(tmp_path / "out").glob("a-teapot-and-a-dog_*_0.png")]) == 1
    done = catversion(*same, "--check", "--prompt=a dog", "--prompt=a car")
    lines = done.stdout.splitlines()
    assert "without the class word 'dog', which the concept was learned with: 'a car'" in done.stderr
    assert lines[2].startswith("dog: 'a dog': moved by")
    assert lines[3] == "dog: 'a car': nothing moved"
    concept_file.save(paths[1], concepts[0])
    assert "expected another one for each concept of a prompt" in error_of(*same, "--prompt=a teapot")
