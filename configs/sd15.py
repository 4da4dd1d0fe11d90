r"""Stable Diffusion 1.5, the paper's model: 4,608 learned parameters, at 512 px.

    catversion train --config=configs/sd15.py \
        --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

`--config=configs/sd15.py:dreambooth` (or textual_inversion, custom_diffusion): a baseline with its published settings.

Result: not measured yet; that needs a GPU or a TPU and the model's weights.
"""

from catversion_jax.config import stable_diffusion


def get_config(method: str = "catversion"):
    return stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", method=method)
