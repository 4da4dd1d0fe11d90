"""What surrounds the subject of each photo: found by the base model, and told in that photo's prompts alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.config import SURROUNDINGS, Config
from catversion_jax.data import concept_sets
from catversion_jax.data.latents import posteriors
from catversion_jax.data.photos import read_photos
from catversion_jax.sampling import conditioning
from catversion_jax.training import concept_data
from catversion_jax.training.concept_data import prepare
from catversion_jax.training.surroundings import SHARES, find_surroundings

DOG = concept_sets.SHIPPED / "dog" / "train"
SEEN = ["at sunset", "with a city in the background", "on a purple rug", "with a mountain in the background"]
"""What a person sees in the dog's first photos."""


@pytest.fixture(scope="module")
def latents(mini) -> np.ndarray:
    images = np.stack([photo.image for photo in read_photos(DOG, 64, None)])
    return posteriors(mini.networks.vae, mini.params["vae"], images, flip=False)[0][:, 0]


def test_what_a_person_sees(mini, latents):
    assert find_surroundings(mini, "a photo of a dog", ["in the rain", *SEEN], latents[:4]) == SEEN


def test_the_least_error_of_the_prediction(mini, latents):
    """The errors of the UNet's predictions, one by one, with numpy's arithmetic."""
    phrases, networks = ["on the beach", "at night"], mini.networks
    noise = np.random.default_rng(0).standard_normal((len(SHARES), *latents.shape[1:])).astype(np.float32)
    errors = np.zeros(2)
    for number, phrase in enumerate(phrases):
        context = conditioning.condition(mini, [f"a dog {phrase}"])
        for share, of_time in zip(SHARES, noise, strict=True):
            timestep = int(share * 1000)
            alpha = networks.schedule.alphas_cumprod[timestep]
            noisy = np.sqrt(alpha) * latents[1] + np.sqrt(1 - alpha) * of_time
            given = (jnp.asarray(noisy[None]), jnp.array([timestep]), *context)
            predicted = networks.unet.apply({"params": mini.params["unet"]}, *given)[0]
            errors[number] += np.square(predicted - of_time).mean()
    assert find_surroundings(mini, "a dog", phrases, latents[1:2]) == [phrases[errors.argmin()]]


@pytest.fixture
def told(monkeypatch):
    """The phrases that are told for photos, instead of those that the model would find."""
    found: list[str] = []
    monkeypatch.setattr(concept_data, "find_surroundings", lambda *_: found)
    return found


def prepared(mini, photos: int, **changes):
    config = Config().replaced({
        "data.dir": str(DOG), "concept.class_word": "dog", "concept.templates": ("a photo of {concept}", "{concept}"),
        "concept.surroundings": SURROUNDINGS, **changes,
    })  # fmt: skip
    method = config.make_method(mini.networks)
    data = prepare(config, method, mini, read_photos(DOG, 64, None)[:photos])
    return jax.tree.map(lambda x: x[0], data), method


def test_each_photo_has_prompts_of_its_own(mini, told):
    told += ["in the snow", "at night", "in the snow"]
    data, method = prepared(mini, 3)
    assert data.prompt_count == 2
    np.testing.assert_array_equal(data.first_prompt[:3], [0, 2, 0])
    expected = ["a photo of a dog in the snow", "a dog in the snow", "a photo of a dog at night", "a dog at night"]
    prompts = jax.tree.map(lambda x: jnp.asarray(x[:4]), data.prompts)
    learned = method.init(jax.random.key(0), mini.networks)
    states = method.condition(learned, prompts, mini.params["text"], mini.networks, 0.0).states
    np.testing.assert_allclose(states, conditioning.condition(mini, expected).states, atol=1e-5)


def test_folders_of_a_size_share_a_step(mini, told):
    """Whatever is found in their photos."""
    told += ["in the snow", "at night", "in the rain"]
    several, _ = prepared(mini, 3)
    told[:] = ["in the snow"]
    one, _ = prepared(mini, 1)
    assert jax.tree.map(np.shape, several) == jax.tree.map(np.shape, one)


def test_without_surroundings_all_photos_share_the_prompts(mini):
    data, _ = prepared(mini, 3, **{"concept.surroundings": ()})
    assert not data.first_prompt.any()
