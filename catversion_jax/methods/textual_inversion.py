"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): trains the embedding of one token."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.text_states import PromptStates
from catversion_jax.methods.base import Method, of_encoders
from catversion_jax.utils.types import Array, Bool, Float, Int, Key, Params

PUBLISHED = {"train.learning_rate": 2e-3, "train.batch_size": 4, "train.steps": 3000}
"""As in the README of diffusers' examples/textual_inversion, whose rate of 5e-4 is multiplied by the batch size."""


@dataclass(frozen=True)
class TextualInversion(Method):
    """Trains `word` [c] and, for SDXL's second text encoder, `word_2`.

    It is added to the embedding of the class word's last token. The paper starts at the class word's embedding,
    which here is an added 0.
    """

    published = PUBLISHED

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        names = of_encoders("word", len(networks.text))
        return {name: jnp.zeros(text.config.hidden_size) for name, text in zip(names, networks.text, strict=True)}

    def first_layers(self, networks: Networks) -> tuple[int, ...]:
        return (0,) * len(networks.text)

    def token_mask(self, last: Int[np.ndarray, "T"], length: int) -> Bool[np.ndarray, "T {length} 1"]:
        return (np.arange(length) == last[:, None])[..., None]

    def apply_to_prompts(
        self, learned: Params, prompts: tuple[PromptStates, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[PromptStates, ...], Sequence[None]]:
        def changed(prompt: PromptStates, word: Float[Array, "c"]) -> PromptStates:
            return prompt.replace(
                hidden=prompt.hidden + (strength * word * prompt.token_mask).astype(prompt.hidden.dtype)
            )

        words = (learned[name] for name in of_encoders("word", len(prompts)))
        return tuple(map(changed, prompts, words)), (None,) * len(prompts)
