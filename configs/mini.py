"""The embedded mini model, on a laptop.

    catversion train --config=configs/mini.py --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

Over the six shipped concepts (4 seeds x the 8 prompts; docs/settings.md), against the base model: CLIP-I to the
held-out photos 0.347 -> 0.461, place accuracy 1.00 -> 0.99, held-out loss 0.1336 -> 0.0938, lower for each of the six.
"""

from catversion_jax.config import JUDGED, default

LEARNING_RATES = {
    "catversion": 0.0125,
    "textual_inversion": 1e-3,
    "dreambooth": 3e-5,
    "custom_diffusion": 1e-4,
}
"""Learning rate of each method; those of the baselines are the better ones of docs/results.md."""


def get_config(method: str = "catversion"):
    config = default()
    config.method = method
    config.adapter.length = 4
    config.adapter.init_std = 0.1
    config.adapter.scope = "trigger"
    config.train.steps = 400
    config.train.learning_rate = LEARNING_RATES.get(method, config.train.learning_rate)
    config.prior.pictures = 16
    config.sample.steps = 20
    config.sample.guidance = 3.0
    config.sample.every = 200
    config.sample.prompts = JUDGED
    return config
