r"""Stable Diffusion 1.4.

    catversion train --config=sd14 \
        --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

CatVersion is trained with five prompts instead of the paper's one, as in configs/sd15.py.

Result: not measured yet; that needs a GPU or a TPU and the model's weights.
"""

from catversion_jax.config import stable_diffusion


def get_config(method: str = "catversion"):
    return stable_diffusion("CompVis/stable-diffusion-v1-4", method=method)
