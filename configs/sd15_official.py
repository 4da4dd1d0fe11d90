r"""Stable Diffusion 1.5 as the authors' code trains it (logit bias 1, the bare class word as prompt, guidance 10).

    catversion train --config=sd15_official \
        --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

Result: not measured yet; that needs a GPU or a TPU and the model's weights.
"""

from catversion_jax.config import stable_diffusion


def get_config():
    config = stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5")
    config.adapter.logit_bias = 1.0
    config.concept.templates = ("{class_word}",)
    config.train.steps = 1001
    # The authors' code multiplies its rate of 5e-3 by the batch size, here 2.
    config.train.learning_rate = 1e-2
    config.sample.scheduler = "ddim"
    config.sample.guidance = 10.0
    return config
