r"""Stable Diffusion XL: a prefix in layers 8 to 10 of the first text encoder and 28 to 30 of the second, at 1024 px.

    catversion train --config=sdxl \
        --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

CatVersion is trained with five prompts instead of the paper's one, as in configs/sd15.py.

Result: not measured yet; that needs a GPU or a TPU and the model's weights.
"""

from catversion_jax.config import stable_diffusion


def get_config(method: str = "catversion"):
    config = stable_diffusion("stabilityai/stable-diffusion-xl-base-1.0", method=method)
    if method == "catversion":
        config.train.batch_size = 1
    config.sample.batch_size = 1
    return config
