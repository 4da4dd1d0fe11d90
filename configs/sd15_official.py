r"""Stable Diffusion 1.5 as the authors' code trains it (logit bias 1, the bare class word as prompt, guidance 10).

    catversion train --config=configs/sd15_official.py \
        --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

Result: not measured yet; the numbers of this config need a GPU or a TPU and the model's weights.
"""

from catversion_jax.config import stable_diffusion


def get_config():
    config = stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5")
    config.adapter.logit_bias = 1.0
    config.concept.templates = ("{class_word}",)
    config.train.steps = 1001
    config.train.learning_rate = 1e-2  # 5e-3 x batch 2, which their code multiplies
    config.sample.scheduler = "ddim"
    config.sample.guidance = 10.0
    return config
