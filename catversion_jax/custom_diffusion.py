"""Custom Diffusion (Kumari et al. 2022, arXiv 2212.04488): the projections to keys and values in the UNet's
cross-attention and the embedding of a new word, with pictures of the class beside the photos."""

from dataclasses import dataclass

from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.dreambooth import DreamBooth
from catversion_jax.pipeline import Networks
from catversion_jax.textual_inversion import TextualInversion
from catversion_jax.types import Array, Key, Params

PUBLISHED = {"train.learning_rate": 8e-5, "train.batch_size": 8, "train.steps": 250, "prior.pictures": 200}
"""As in the paper, section 4, for one concept."""

LAYERS = ("to_k", "to_v")
"""What is learned of each cross-attention (attn2)."""


@dataclass(frozen=True)
class CustomDiffusion(DreamBooth, TextualInversion):
    """Learns `unet`: what is added to LAYERS; and `word`, as Textual Inversion does, but the identifier's. The paper's
    pictures of the class are real ones; here the base model draws them, which the paper looks at too."""

    published = PUBLISHED

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        every = flatten_dict(DreamBooth.init(self, key, networks))
        projections = {path: x for path, x in every.items() if "attn2" in path and path[-2] in LAYERS}
        return TextualInversion.init(self, key, networks) | unflatten_dict(projections)
