"""Pictures: a function of prompt and seed; the base model at strength 0."""

import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax import diffusion, sampling
from catversion_jax.artifact import Concept
from tests.conftest import max_error

CONFIG = sampling.SamplerConfig(steps=3, guidance=5.0, batch_size=2)


@pytest.fixture(scope="module")
def concept(tiny_pipeline) -> Concept:
    prefix = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 16)).astype(np.float32) * 3
    return Concept(prefix, "teapot", (), (1, 2, 3), 0.0, "all", tiny_pipeline.fingerprint, "", 1, 0.01, 0)


def paint(pipeline, prompts, seeds, **kwargs):
    return list(sampling.paint(pipeline, prompts, seeds, CONFIG, **kwargs))


def test_a_picture_depends_on_its_seed_alone(tiny_pipeline, concept):
    prompts = ["a teapot", "a red teapot", "a teapot"]
    three = paint(tiny_pipeline, prompts, [5, 6, 7], concept=concept)
    assert [image.shape for image in three] == [(16, 16, 3)] * 3
    assert three[0].dtype == np.uint8
    for i in range(3):
        (alone,) = paint(tiny_pipeline, prompts[i : i + 1], [5 + i], concept=concept)
        np.testing.assert_array_equal(alone, three[i])
    assert (three[0] != three[2]).any()


def test_strength(tiny_pipeline, concept):
    def states(strength):
        token_ids = tiny_pipeline.tokenizer(["a teapot"])
        prefix = sampling.concept_prefix(concept, strength, token_ids, tiny_pipeline.tokenizer)
        return sampling.encode(tiny_pipeline.params["text"], token_ids, prefix, networks=tiny_pipeline.networks)

    token_ids = tiny_pipeline.tokenizer(["a teapot"])
    base = sampling.encode(tiny_pipeline.params["text"], token_ids, None, networks=tiny_pipeline.networks)
    assert max_error(states(0.0), base) < 1e-5
    moved = [max_error(states(s), base) for s in (0.05, 0.5, 1.0)]
    assert 0.01 < moved[0] < moved[1] < moved[2]


def test_trigger_leaves_other_prompts_alone(tiny_pipeline, concept):
    import dataclasses

    trigger = dataclasses.replace(concept, scope="trigger")
    prompts, seeds = ["a car", "a teapot"], [1, 1]
    base = paint(tiny_pipeline, prompts, seeds, concept=trigger, strength=0.0)
    with_concept = paint(tiny_pipeline, prompts, seeds, concept=trigger)
    np.testing.assert_array_equal(base[0], with_concept[0])
    assert (base[1] != with_concept[1]).any()


def test_the_negative_branch_never_sees_the_prefix(tiny_pipeline, concept):
    """At guidance 0 only the negative branch is left: the concept changes nothing, the negative prompt does."""
    config = sampling.SamplerConfig(steps=3, guidance=0.0, batch_size=2)
    args = (tiny_pipeline, ["a teapot"], [1], config)
    (without,) = sampling.paint(*args)
    (with_concept,) = sampling.paint(*args, concept=concept)
    (negative,) = sampling.paint(*args, concept=concept, negative_prompt="a car")
    np.testing.assert_array_equal(without, with_concept)
    assert (without != negative).any()


def test_dispatches_give_the_same_latents(tiny_pipeline):
    net, params = tiny_pipeline.networks, tiny_pipeline.params
    context = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 77, 32)), jnp.float32)
    results = [
        sampling.sample_latents(
            params["unet"],
            sampling.initial_latents(jnp.arange(2, dtype=jnp.uint32), net.latent_shape),
            context,
            networks=net,
            steps=4,
            guidance=2.0,
            steps_per_dispatch=n,
        )
        for n in (1, 4)
    ]
    assert max_error(*results) < 1e-4


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_with_a_perfect_prediction_arrives(prediction_type):
    """A predictor that knows the clean latents brings DDIM to them, in either parametrization."""
    rng = np.random.default_rng(0)
    schedule = diffusion.NoiseSchedule(prediction_type=prediction_type, set_alpha_to_one=True)
    clean, noise = (jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32) for _ in range(2))
    alphas, previous = schedule.ddim_alphas(10)
    x = diffusion.add_noise(clean, noise, jnp.full(2, alphas[0]))
    for alpha, alpha_previous in zip(alphas, previous, strict=True):
        now = (x - jnp.sqrt(alpha) * clean) / jnp.sqrt(1 - alpha)
        target = diffusion.TARGETS[prediction_type](clean, now, jnp.full(2, alpha))
        x = diffusion.ddim_update(target, x, alpha, alpha_previous, prediction_type)
    assert max_error(x, clean) < 1e-3
