"""Custom Diffusion (Kumari et al. 2022, arXiv 2212.04488).

Trains the key and value projections of the UNet's cross-attention and the embedding of a new word, on the photos and on
images of the class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.text_states import PromptStates
from catversion_jax.methods.textual_inversion import TextualInversion
from catversion_jax.methods.unet_method import UNetMethod, unet_changes
from catversion_jax.utils.types import Array, Bool, Float, Int, Key, Params

PUBLISHED = {"train.learning_rate": 8e-5, "train.batch_size": 8, "train.steps": 250, "prior.pictures": 200}
"""As in the paper, section 4, for one concept."""

LAYERS = ("to_k", "to_v")
"""The projections of each cross-attention (attn2) that are trained."""

WORD = TextualInversion()
"""How the new word is trained."""


@dataclass(frozen=True)
class CustomDiffusion(UNetMethod):
    """Trains LAYERS of the UNet, and `word`, as in Textual Inversion but in the identifier's place.

    The paper's images of the class are real ones; here the base model samples them, a variant that the paper also
    examines.
    """

    published = PUBLISHED

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        every = flatten_dict({"unet": unet_changes(networks)})
        projections = {path: x for path, x in every.items() if "attn2" in path and path[-2] in LAYERS}
        return WORD.init(key, networks) | unflatten_dict(projections)

    def first_layers(self, networks: Networks) -> tuple[int, ...]:
        return WORD.first_layers(networks)

    def token_mask(self, last: Int[np.ndarray, "T"], length: int) -> Bool[np.ndarray, "T {length} 1"]:
        return WORD.token_mask(last, length)

    def apply_to_prompts(
        self, learned: Params, prompts: tuple[PromptStates, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[PromptStates, ...], Sequence[None]]:
        return WORD.apply_to_prompts(learned, prompts, strength)
