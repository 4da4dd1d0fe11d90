"""Pictures: a function of prompt and seed; the base model at strength 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.base.pipeline import drawing_dtype
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.concept_file import Concept
from catversion_jax.models.unet import UNet2DConditionModel
from catversion_jax.sampling import conditioning, denoising, sampler
from catversion_jax.utils.errors import UserError
from tests import tiny
from tests.conftest import max_error

CONFIG = SamplerConfig(steps=3, guidance=5.0, batch_size=2)


@pytest.fixture(scope="module")
def concept(tiny_pipeline) -> Concept:
    prefix = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 16)).astype(np.float32) * 3
    return tiny.concept(prefix, tiny_pipeline.fingerprint)


def sample(pipeline, prompts, seeds, *concepts, config=CONFIG, negative_prompt=""):
    request = sampler.SampleRequest(tuple(prompts), tuple(seeds), config, negative_prompt)
    return list(sampler.sample_images(pipeline, request, concepts))


def test_a_picture_depends_on_its_seed_alone(tiny_pipeline, concept):
    prompts = ["a teapot", "a red teapot", "a teapot"]
    three = sample(tiny_pipeline, prompts, [5, 6, 7], concept)
    assert [image.shape for image in three] == [(16, 16, 3)] * 3
    assert three[0].dtype == np.uint8
    for i in range(3):
        (alone,) = sample(tiny_pipeline, prompts[i : i + 1], [5 + i], concept)
        np.testing.assert_array_equal(alone, three[i])
    assert (three[0] != three[2]).any()


def test_strength(tiny_pipeline, concept):
    def states(strength):
        return conditioning.condition(tiny_pipeline, ["a teapot"], concept.at(strength)).states

    base = conditioning.condition(tiny_pipeline, ["a teapot"]).states
    assert max_error(states(0.0), base) < 1e-5
    moved = [max_error(states(s), base) for s in (0.05, 0.5, 1.0)]
    assert 0.01 < moved[0] < moved[1] < moved[2]


def test_trigger_leaves_other_prompts_alone(tiny_pipeline, concept):

    trigger = dataclasses.replace(concept, method=dataclasses.replace(concept.method, scope="trigger"))
    prompts, seeds = ["a car", "a teapot"], [1, 1]
    base = sample(tiny_pipeline, prompts, seeds)
    with_concept = sample(tiny_pipeline, prompts, seeds, trigger)
    np.testing.assert_array_equal(base[0], with_concept[0])
    assert (base[1] != with_concept[1]).any()


def test_guidance_of_one_is_half_the_work(tiny_pipeline, concept, monkeypatch):
    """One branch instead of two, the same picture, and no negative prompt; for one concept and for two."""
    rows, steps = [], denoising.denoise_steps
    monkeypatch.setattr(
        denoising,
        "denoise_steps",
        lambda *given, **how: rows.append(len(given[2].context.states)) or steps(*given, **how),
    )
    dog = dataclasses.replace(concept, class_word="dog")
    for concepts, branches in (((concept,), 1), ((concept, dog), 3)):
        found = []
        for guidance, negative in ((1.0, ""), (1.0, "a cup"), (float(np.nextafter(np.float32(1), 2)), "")):
            asked = sampler.SampleRequest(
                ("a teapot and a dog",), (0,), SamplerConfig(2, guidance, 1, "ddim"), negative
            )
            ((latents, _),) = sampler.sample_latents(tiny_pipeline, asked, concepts)
            found.append(np.asarray(latents))
        assert rows == [branches] * 4 + [branches + 1] * 2
        rows.clear()
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_allclose(found[0], found[2], atol=1e-4)


def test_the_negative_branch_never_sees_the_prefix(tiny_pipeline, concept):
    """At guidance 0 only the negative branch is left: the concept changes nothing, the negative prompt does."""
    config = SamplerConfig(steps=3, guidance=0.0, batch_size=2)
    asked = (tiny_pipeline, ["a teapot"], [1])
    (without,) = sample(*asked, config=config)
    (with_concept,) = sample(*asked, concept, config=config)
    (negative,) = sample(*asked, concept, config=config, negative_prompt="a car")
    np.testing.assert_array_equal(without, with_concept)
    assert (without != negative).any()


@pytest.mark.parametrize(("part", "network"), [("text", "text encoder"), ("unet", "UNet"), ("vae", "VAE")])
def test_no_black_images(tiny_pipeline, part, network):
    """What gives NaN is an error that names it; the images that would come of it are black."""
    leaves, structure = jax.tree.flatten(tiny_pipeline.params[part])
    broken = jax.tree.unflatten(structure, [jnp.full_like(x, jnp.nan) for x in leaves])
    pipeline = dataclasses.replace(tiny_pipeline, params=tiny_pipeline.params | {part: broken})
    request = sampler.SampleRequest(("a teapot",), (0,), SamplerConfig(1, 1.0, 1))
    with pytest.raises(UserError, match=f"the {network} gives NaN or infinity"):
        list(sampler.sample_images(pipeline, request))


def test_a_decoder_in_bfloat16_gives_nearly_the_same_pixels(mini):
    request = sampler.SampleRequest(("a photo of a teapot", "a photo of a dog"), (0, 1), SamplerConfig(3, batch_size=2))
    ((latents, _),) = sampler.sample_latents(mini, request)
    unet = UNet2DConditionModel(dataclasses.replace(mini.networks.unet.config, dtype=jnp.bfloat16))
    narrow = dataclasses.replace(mini.networks, unet=unet)
    pixels, in_bfloat16 = (
        np.asarray(denoising.decode_latents(mini.params["vae"], latents, networks=networks)[0], int)
        for networks in (mini.networks, narrow)
    )
    apart = abs(pixels - in_bfloat16)
    assert 0 < apart.mean() < 0.5
    assert apart.max() <= 4


def test_pictures_are_drawn_in_bfloat16_but_on_a_cpu(monkeypatch):
    assert drawing_dtype() == "float32"
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert drawing_dtype() == "bfloat16"
