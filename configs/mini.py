"""The embedded mini model on a laptop."""

from catversion_jax.config import default


def get_config():
    config = default()
    config.adapter.length = 4
    config.adapter.init_std = 0.1
    config.train.batch_size = 4
    config.train.steps = 200
    config.train.decay = "cosine"
    config.sample.steps = 30
    config.sample.guidance = 5.0
    config.sample.every = 100
    config.sample.prompts = (
        "a photo of {concept} on the beach",
        "a photo of {concept} in the snow",
        "a photo of {concept} in the jungle",
        "a photo of {concept} on a wooden floor",
        "a photo of {concept} at night",
        "a photo of {concept} with a city in the background",
        "a photo of a blue {class_word}",
        "a photo of {concept} wearing a hat",
    )
    return config
