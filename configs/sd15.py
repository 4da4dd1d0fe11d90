r"""Stable Diffusion 1.5, the paper's model: 4,608 numbers learned at 512 px.

    catversion train --config=configs/sd15.py \
        --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

`--config=configs/sd15.py:dreambooth` (or textual_inversion, custom_diffusion) is a rival with its published setting.

Result: not measured yet; the numbers of this config need a GPU or a TPU and the model's weights.
"""

from catversion_jax.config import stable_diffusion


def get_config(method: str = "catversion"):
    return stable_diffusion("stable-diffusion-v1-5/stable-diffusion-v1-5", method=method)
