"""Several concepts in one image: each in its own region, the base model elsewhere."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.base.words import token_weights
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.textual_inversion import TextualInversion
from catversion_jax.sampling import regions, sampler
from tests import tiny

CONFIG = SamplerConfig(steps=2, guidance=3.0, batch_size=2)


@pytest.fixture(scope="module")
def concepts(tiny_pipeline) -> list[Concept]:
    rng = np.random.default_rng(0)
    prefixes = [3 * rng.normal(size=(length, 3, 2, 2, 16)).astype(np.float32) for length in (2, 1)]
    teapot, dog = (tiny.concept(prefix, tiny_pipeline.fingerprint, scope="trigger") for prefix in prefixes)
    return [teapot, dataclasses.replace(dog, class_word="dog")]


def latents(pipeline, prompts, *concepts) -> np.ndarray:
    request = sampler.SampleRequest(tuple(prompts), (7,) * len(prompts), CONFIG)
    return np.concatenate([np.asarray(x)[:real] for x, real in sampler.sample_latents(pipeline, request, concepts)])


def test_attention_to_words_against_numpy():
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((2, 16, 5)).astype(np.float32), rng.random((2, 4, 5)).astype(np.float32)
    sown = {
        "down": {
            "attn2": {"probabilities": (jnp.asarray(fine),)},
            "attn1": {"probabilities": (jnp.ones((2, 16, 16)),)},
        },
        "mid_block": {"attn2": {"probabilities": (jnp.asarray(coarse),)}},
    }
    of_words = np.float32([[[0, 1, 0, 0, 0]] * 2, [[0, 0, 0.5, 0.5, 0]] * 2])
    expected = np.stack([fine[..., 1], fine[..., 2:4].mean(-1)])
    expected = (expected / expected.max(-1, keepdims=True)).reshape(2, 2, 4, 4)
    np.testing.assert_allclose(regions.attention_to_words(sown, of_words, (4, 4)), expected, atol=1e-6)


def test_maps_of_other_sizes():
    """Latents of 5 by 6 have maps of 5 by 6, 3 by 3 and 2 by 2, each of which shows where a word is."""
    of_words = np.float32([[[0, 1.0]]])
    for rows, columns in ((5, 6), (3, 3), (2, 2)):
        seen = np.zeros((1, rows * columns, 2), np.float32)
        seen[0, -1, 1] = 1  # the last position alone
        sown = {"up": {"attn2": {"probabilities": (jnp.asarray(seen),)}}}
        found = np.asarray(regions.attention_to_words(sown, of_words, (5, 6), 2))[0, 0]
        assert found.shape == (10, 12)
        assert np.unravel_index(found.argmax(), found.shape) == (9, 11)
        assert regions.size_of_map(rows * columns, (5, 6)) == (rows, columns)


def test_find_regions():
    """Where a word is seen most, and clearly; everywhere for a concept that is alone in its prompt."""
    left, right = np.float32([[1, 0.6, 0.3, 0.1]]), np.float32([[0.1, 0.2, 0.4, 0.5]])
    attention = jnp.asarray(np.stack([left, right])[:, None].repeat(3, 1))  # [W, B, h, w]
    both, first, none = [[0, 1.0], [1.0, 0]], [[0, 1.0], [0, 0]], [[0, 0.0], [0, 0]]
    of_words = np.stack([both, first, none], axis=1).astype(np.float32)
    found = np.asarray(regions.find_regions(attention, of_words))[..., 0, :, 0]
    np.testing.assert_array_equal(found[:, 0], [[1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(found[:, 1], [[1, 1, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(found[:, 2], np.zeros((2, 4)))


def test_the_join_is_exact():
    """The prediction at a place is that of one branch, to the bit."""
    rng = np.random.default_rng(0)
    base, each = rng.normal(size=(1, 2, 2, 3)).astype(np.float32), rng.normal(size=(2, 1, 2, 2, 3)).astype(np.float32)
    places = np.zeros((2, 1, 2, 2, 1), np.float32)
    places[0, 0, 0, 0] = places[1, 0, 1, 1] = 1
    expected = base.copy()
    expected[0, 0, 0], expected[0, 1, 1] = each[0, 0, 0, 0], each[1, 0, 1, 1]
    np.testing.assert_array_equal(regions.join_by_region(*map(jnp.asarray, (base, each, places))), expected)


def test_token_weights(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    ids = tokenizer(["a teapot and a dog", "a dog", "a car"])
    weights = token_weights(tokenizer, ids, ["teapot", "dog"])
    assert weights.sum(-1).round(6).tolist() == [[1, 0, 0], [1, 1, 0]]
    for word, of_word in zip(("teapot", "dog"), weights, strict=True):
        assert ids[0][of_word[0] > 0].tolist() == list(tokenizer.word(word))


def test_a_prompt_with_one_of_the_words_has_that_concepts_image(tiny_pipeline, concepts):
    prompts = ["a teapot in the snow", "a dog in the snow", "a car"]
    both = latents(tiny_pipeline, prompts, *concepts)
    for image, prompt, alone in zip(both, prompts, ([concepts[0]], [concepts[1]], []), strict=True):
        np.testing.assert_allclose(image, latents(tiny_pipeline, [prompt], *alone)[0], atol=1e-4)


def test_an_image_depends_on_its_prompt_and_seed_alone(tiny_pipeline, concepts):
    """Not on its neighbours in the batch, also if those hold other words."""
    prompts, seeds = ("a teapot and a dog", "a dog", "a dog and a teapot at night"), (7, 8, 9)
    request = sampler.SampleRequest(prompts, seeds, CONFIG)
    every = np.concatenate(
        [np.asarray(x)[:real] for x, real in sampler.sample_latents(tiny_pipeline, request, concepts)]
    )
    for prompt, seed, image in zip(prompts, seeds, every, strict=True):
        alone = sampler.SampleRequest((prompt,), (seed,), CONFIG)
        ((latents_alone, _),) = sampler.sample_latents(tiny_pipeline, alone, concepts)
        np.testing.assert_array_equal(np.asarray(latents_alone)[0], image)


def test_beside_textual_inversion(tiny_pipeline, concepts):
    """Each method moves the other's image; together both act."""
    teapot, dog = concepts
    method = TextualInversion()
    word = np.random.default_rng(1).normal(size=32).astype(np.float32)
    inverted = dataclasses.replace(dog, method=method, learned={"word": word})
    prompts = ["a teapot and a dog"]
    together = latents(tiny_pipeline, prompts, teapot, inverted)
    for others in ([teapot], [inverted]):
        assert np.abs(together - latents(tiny_pipeline, prompts, *others)).max() > 1e-3


def test_both_words(tiny_pipeline, concepts):
    """The image is neither concept's alone, and the order of the concepts makes no difference."""
    prompts = ["a teapot and a dog"]
    together = latents(tiny_pipeline, prompts, *concepts)
    np.testing.assert_allclose(together, latents(tiny_pipeline, prompts, *concepts[::-1]), atol=1e-4)
    for others in ([], concepts[:1], concepts[1:]):
        assert np.abs(together - latents(tiny_pipeline, prompts, *others)).max() > 1e-3
    without = [concept.at(0.0) for concept in concepts]
    np.testing.assert_array_equal(latents(tiny_pipeline, prompts, *without), latents(tiny_pipeline, prompts))
