"""The embedded mini model, on a laptop.

    catversion train --config=configs/mini.py --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

docs/settings.md says how these values were chosen.
"""

from catversion_jax.config import JUDGED, PROMPTS, default

LEARNING_RATES = {
    "catversion": 0.025,
    "textual_inversion": 1e-3,
    "dreambooth": 6e-5,
    "custom_diffusion": 1e-4,
}

SURROUNDINGS = (
    "on the beach",
    "in the snow",
    "in the jungle",
    "on green grass",
    "in the desert",
    "under the sea",
    "in the water",
    "at night",
    "at sunset",
    "on a wooden floor",
    "in front of a brick wall",
    "on a cobblestone street",
    "with a city in the background",
    "with a mountain in the background",
    "on pink fabric",
    "on a checkered floor",
    "in a wheat field",
    "on a purple rug",
    "in space",
    "in the rain",
    "in the fog",
    "on a white background",
)
"""The places that the model knows."""


def get_config(method: str = "catversion"):
    config = default()
    config.method = method
    config.adapter.length = 4
    config.adapter.init_std = 0.1
    config.adapter.scope = "trigger"
    config.train.steps = 200
    # The noisy third: a text state decides shape and layout, and says little about the clean steps.
    config.train.timesteps = (0.65, 1.0)
    if method == "catversion":
        config.concept.templates = PROMPTS
        config.concept.surroundings = SURROUNDINGS
        config.train.text_penalty = 0.05
        config.sample.strength = 0.6
    config.train.learning_rate = LEARNING_RATES.get(method, config.train.learning_rate)
    config.prior.pictures = 16
    config.sample.scheduler = "dpmpp_2m"
    config.sample.steps = 10
    config.sample.guidance = 5.0
    config.sample.every = 100
    config.sample.prompts = JUDGED
    return config
