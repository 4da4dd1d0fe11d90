"""What surrounds the subject of each photo: found by the base model, and told in that photo's prompts alone."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.base.pipeline import MINI
from catversion_jax.config import Config
from catversion_jax.data import concept_sets
from catversion_jax.data.latents import posteriors
from catversion_jax.data.photos import read_photos
from catversion_jax.methods import concept_file
from catversion_jax.sampling import conditioning
from catversion_jax.study.accuracy import read_world
from catversion_jax.training import run_dir, surroundings
from catversion_jax.training.concept_data import check_prompts, prepare
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.surroundings import SHARES, find_surroundings
from catversion_jax.utils.errors import UserError
from configs.mini import SURROUNDINGS

DOG = concept_sets.SHIPPED / "dog" / "train"
SEEN = ["at sunset", "with a city in the background"]
"""What a person sees in the first two photos of the dog."""


@pytest.fixture(scope="module")
def photos():
    return read_photos(DOG, 64, None)


@pytest.fixture(scope="module")
def latents(mini, photos) -> np.ndarray:
    images = np.stack([photo.image for photo in photos])
    return posteriors(mini.networks.vae, mini.params["vae"], images, flip=False)[0][:, 0]


def test_the_least_error_of_the_prediction(mini, latents):
    """The errors of the UNet's predictions, one by one, with numpy's arithmetic; it is what a person sees."""
    networks, latents, phrases = mini.networks, latents[:2], ["in the rain", *SEEN]
    noise = np.random.default_rng(0).standard_normal((len(SHARES), *networks.latent_shape)).astype(np.float32)
    errors = np.zeros((len(latents), len(phrases)))
    apply = jax.jit(lambda *given: networks.unet.apply({"params": mini.params["unet"]}, *given))
    for number, phrase in enumerate(phrases):
        context = conditioning.condition(mini, [f"a photo of a dog {phrase}"])
        for share, of_time in zip(SHARES, noise, strict=True):
            timestep = int(share * 1000)
            alpha = networks.schedule.alphas_cumprod[timestep]
            for photo, clean in enumerate(latents):
                noisy = np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * of_time
                predicted = apply(jnp.asarray(noisy[None]), jnp.array([timestep]), *context)[0]
                errors[photo, number] += np.square(predicted - of_time).mean()
    assert [phrases[best] for best in errors.argmin(1)] == SEEN
    assert list(find_surroundings(mini, "a photo of a dog", phrases, latents)) == SEEN


@pytest.fixture
def told(monkeypatch):
    """The phrases that are told for photos, instead of those that the model would find."""
    found: list[str] = []
    monkeypatch.setattr(surroundings, "find_surroundings", lambda *_: iter(found))
    return found


def config_of(**changes) -> Config:
    return Config().replaced({
        "data.dir": str(DOG), "concept.class_word": "dog", "concept.templates": ("a photo of {concept}", "{concept}"),
        "concept.surroundings": SURROUNDINGS, **{key.replace("__", "."): value for key, value in changes.items()},
    })  # fmt: skip


def prepared(mini, photos, run: RunDir | None = None, **changes):
    config = config_of(**changes)
    data = prepare(config, config.make_method(mini.networks), mini, photos, run=run)
    return jax.tree.map(lambda x: x[0], data)


def test_each_photo_has_prompts_of_its_own(mini, told, photos):
    told += ["in the snow", "at night", "in the snow"]
    data = prepared(mini, photos[:3], adapter__scope="trigger", adapter__init_std=0.5)
    assert data.prompt_count == 2
    np.testing.assert_array_equal(data.first_prompt[:3], [0, 2, 0])
    expected = ["a photo of a dog in the snow", "a dog in the snow", "a photo of a dog at night", "a dog at night"]
    prompts = jax.tree.map(lambda x: jnp.asarray(x[:4]), data.prompts)
    method = config_of(adapter__scope="trigger", adapter__init_std=0.5).make_method(mini.networks)
    learned = method.init(jax.random.key(0), mini.networks)
    concept = concept_of(mini, method, learned)
    for strength in (0.0, 1.0):
        states = method.condition(learned, prompts, mini.params["text"], mini.networks, strength).states
        expected_states = conditioning.condition(mini, expected, concept.at(strength)).states
        np.testing.assert_allclose(states, expected_states, atol=1e-4)


def concept_of(pipeline, method, learned) -> concept_file.Concept:
    return concept_file.Concept(
        learned=learned, method=method, class_word="dog", templates=("a photo of {concept}",), model_path="",
        fingerprint=pipeline.fingerprint, steps=0, learning_rate=0.0, seed=0,
    )  # fmt: skip


def test_folders_of_a_size_share_a_step(mini, told, photos):
    """And the program that encodes their prompts, whatever is found in their photos."""
    told += ["in the snow", "at night", "in the rain"]
    several = prepared(mini, photos[:3])
    told[:] = ["in the snow"]
    one = prepared(mini, photos[:1])
    assert jax.tree.map(np.shape, several) == jax.tree.map(np.shape, one)
    assert len(several.prompts[0].hidden) == 2 * 8


def test_without_surroundings_all_photos_share_the_prompts(mini, photos):
    data = prepared(mini, photos[:3], concept__surroundings=())
    assert not data.first_prompt.any()
    # A phrase that names the subject says nothing about what surrounds it.
    alike = prepared(mini, photos[:3], concept__surroundings=("beside a dog", "under the Dog"))
    assert not alike.first_prompt.any()
    np.testing.assert_array_equal(alike.prompts[0].hidden[:2], data.prompts[0].hidden[:2])


def test_a_run_keeps_them(mini, told, photos, tmp_path, monkeypatch):
    """From its first step on: before that, the photos may be others."""
    run = RunDir(tmp_path)
    told += ["in the snow", "at night"]
    first = prepared(mini, photos[:2], run)
    assert json.loads(run.surroundings.read_text()) == {photos[0].name: "in the snow", photos[1].name: "at night"}
    told[:] = ["at night", "at night"]
    assert not prepared(mini, photos[:2], run).first_prompt.any()
    told[:] = ["in the snow", "at night"]
    prepared(mini, photos[:2], run)
    monkeypatch.setattr(run_dir.RunDir, "has_saved_steps", True)
    told[:] = ["at night", "at night"]
    np.testing.assert_array_equal(prepared(mini, photos[:2], run).first_prompt, first.first_prompt)
    run.surroundings.write_text("{")
    with pytest.raises(UserError, match=r"surroundings\.json: .*; expected the phrase of each photo; remove the file"):
        prepared(mini, photos[:2], run)
    run.surroundings.unlink()
    assert not prepared(mini, photos[:2], run).first_prompt.any()


def test_a_prompt_without_room_for_them(mini, caplog):
    config = config_of(concept__templates=("a photo of {concept}", "{concept} " + "very " * 72), method="dreambooth")
    check_prompts(config, config.make_method(mini.networks), replace(mini))
    (warning,) = caplog.messages
    assert warning.startswith("training prompts too long for the surroundings: 'a dog very very")


def test_the_mini_models_places():
    assert read_world(MINI).phrases == SURROUNDINGS
