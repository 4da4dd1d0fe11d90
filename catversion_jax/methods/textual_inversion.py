"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): trains the embedding of one token.

Ours is an offset on the class word. The embedding of another program (embedding_files.py) has vectors of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.prompt_tokens import PLACEHOLDER
from catversion_jax.base.text_states import PromptStates, upper_layers
from catversion_jax.methods.base import Method, check_keys, of_encoders
from catversion_jax.models.unet import Context
from catversion_jax.utils.types import Array, Bool, Float, Int, Key, Params

PUBLISHED = {"train.learning_rate": 2e-3, "train.batch_size": 4, "train.steps": 3000}
"""As in the README of diffusers' examples/textual_inversion, whose rate of 5e-4 is multiplied by the batch size."""


@dataclass(frozen=True)
class TextualInversion(Method):
    """Trains `word` [c] and, for SDXL's second text encoder, `word_2`.

    It is added to the embedding of the class word's last token. The paper starts at the class word's embedding,
    which here is an added 0. With `vectors`, which are never trained here, these are [vectors, c], and stand in the
    place of the class word.
    """

    published = PUBLISHED
    vectors: int = 0

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], learned: Params) -> "TextualInversion":
        check_keys(metadata, set(), {"vectors"})
        method = msgspec.convert(metadata, cls)
        if any(method.vectors != (len(x) if x.ndim == 2 else 0) for x in learned.values()):
            raise ValueError(f"vectors {method.vectors}; expected as many as its arrays have")
        return method

    def metadata(self) -> dict[str, Any]:
        return {"vectors": self.vectors} if self.vectors else {}

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        names, count = of_encoders("word", len(networks.text)), (self.vectors,) if self.vectors else ()
        return {
            name: jnp.zeros((*count, text.config.hidden_size)) for name, text in zip(names, networks.text, strict=True)
        }

    def misfit(self, learned: Params, networks: Networks) -> str | None:
        if not self.vectors or not super().misfit(learned, networks):
            return super().misfit(learned, networks)
        theirs = " and ".join(str(array.shape[-1]) for array in learned.values())
        sizes = " and ".join(str(text.config.hidden_size) for text in networks.text)
        return f"an embedding of {theirs} channels, but the text encoder has {sizes}"

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

    def condition(
        self,
        learned: Params,
        prompts: tuple[PromptStates, ...],
        text_params: tuple[Params, ...],
        networks: Networks,
        strength: Float[Array, ""] | float = 1.0,
    ) -> Context:
        if not self.vectors:
            return super().condition(learned, prompts, text_params, networks, strength)
        names = of_encoders("word", len(prompts))
        changed = tuple(
            in_place(prompt, learned[name], params, strength)
            for prompt, name, params in zip(prompts, names, text_params, strict=True)
        )
        return upper_layers(networks.text, text_params, changed, (None,) * len(prompts), self.first_layers(networks))


def in_place(
    prompt: PromptStates, vectors: Float[Array, "P c"], params: Params, strength: Float[Array, ""] | float
) -> PromptStates:
    """Puts vectors in the place of the placeholders' embeddings; the positions' embeddings stay."""
    placeholder = params["text_model"]["embeddings"]["token_embedding"]["embedding"][PLACEHOLDER]
    step = strength * (vectors - placeholder.astype(vectors.dtype))
    moved = jnp.einsum("tqp,pc->tqc", jnp.asarray(prompt.token_mask, vectors.dtype), step)
    return prompt.replace(hidden=prompt.hidden + moved.astype(prompt.hidden.dtype))
