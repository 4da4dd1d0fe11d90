"""CatVersion as a method: what is trained, and where it enters; its attention is in models/prefix_attention.py.

learned         a prefix of keys and values in each text encoder: float32 [P, L, 2, H, D]
initialisation  N(0, init_std^2); a part (key or value) that is not trained is 0 (`init`)
where it enters the text encoder's layers `layers`, the last three by default (`first_layers`, `apply_to_prompts`)
who sees it     by `scope`: all tokens, or those from the class word on (`token_mask`)
loss            the base model's own denoising loss on the photos (training/step.py); the base model is frozen
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.text_states import PromptStates
from catversion_jax.methods.base import Method, check_keys, of_encoders
from catversion_jax.methods.hyperparameters import PARTS, AdapterConfig, Hyperparameters
from catversion_jax.models.prefix_attention import SCOPES, Prefix, init_prefix, resolve_layers
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Array, Bool, Float, Int, Key, Params

DEFAULTS = AdapterConfig()


class Recorded(msgspec.Struct):
    """The method's fields in a concept's file."""

    layers: tuple[int, ...]  # of the first text encoder
    logit_bias: float
    scope: str
    layers_2: tuple[int, ...] = ()  # of SDXL's second one


@dataclass(frozen=True)
class CatVersion(Method):
    """Zhao et al. 2023 (arXiv 2311.14631). Trains `prefix` and, in SDXL's second text encoder, `prefix_2`."""

    layers: tuple[tuple[int, ...], ...]  # per text encoder: ascending layer indices
    logit_bias: float = DEFAULTS.logit_bias  # added to every prefix logit: 0 in the paper, 1 in the authors' code
    scope: str = DEFAULTS.scope  # one of prefix_attention.SCOPES
    parts: tuple[str, ...] = PARTS  # those that are trained; the other one stays 0
    length: int = field(default=DEFAULTS.length, compare=False)  # P; only `init` uses it
    init_std: float = field(default=DEFAULTS.init_std, compare=False)  # only `init` uses it

    @classmethod
    def from_hyperparameters(cls, hyperparameters: Hyperparameters, networks: Networks) -> "CatVersion":
        adapter = hyperparameters.adapter
        try:
            layers = tuple(resolve_layers(adapter.layers, encoder.config.depth) for encoder in networks.text)
        except ValueError as error:
            raise UserError(f"config.adapter.{error}") from error
        return cls(**(vars(adapter) | {"layers": layers}))

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], learned: Params) -> "CatVersion":
        check_keys(metadata, {"layers", "logit_bias", "scope"}, {"layers_2"})
        recorded = msgspec.convert(metadata, Recorded)
        expected = ["prefix", "prefix_2"][: 1 + ("layers_2" in metadata)]
        if sorted(learned) != expected:
            raise ValueError(f"tensors {sorted(learned)}; expected {expected}")
        layers = (recorded.layers, *([recorded.layers_2] if "layers_2" in metadata else []))
        if bad := [of_encoder for of_encoder in layers if not of_encoder or sorted({*of_encoder}) != [*of_encoder]]:
            raise ValueError(f"layers {[*bad[0]]}; expected indices that ascend")
        for (name, prefix), of_encoder in zip(sorted(learned.items()), layers, strict=True):
            is_array = isinstance(prefix, np.ndarray) and prefix.ndim == 5 and prefix.size > 0
            if not is_array or prefix.dtype != np.float32 or prefix.shape[1:3] != (len(of_encoder), 2):
                wanted = f"[P, {len(of_encoder)}, 2, heads, head_dim]"
                raise ValueError(f"{name} {prefix.dtype} {list(prefix.shape)}; expected float32 {wanted}")
        if recorded.scope not in SCOPES:
            raise ValueError(f"scope {recorded.scope!r}; expected one of {', '.join(SCOPES)}")
        return cls(layers, recorded.logit_bias, recorded.scope)

    def metadata(self) -> dict[str, Any]:
        return {"logit_bias": self.logit_bias, "scope": self.scope} | dict(
            zip(("layers", "layers_2"), self.layers, strict=False)
        )

    def init(self, key: Key[Array, ""], networks: Networks) -> Params:
        learned = {}
        for i, name in enumerate(of_encoders("prefix", len(networks.text))):
            of_encoder = jax.random.fold_in(key, i) if i else key
            shape = (self.length, len(self.layers[i]), networks.heads[i])
            learned[name] = self.learned_parts(init_prefix(of_encoder, *shape, self.init_std))
        return learned

    def misfit(self, learned: Params, networks: Networks) -> str | None:
        names = of_encoders("prefix", len(learned))
        for name, layers, encoder in zip(names, self.layers, networks.text, strict=False):
            prefix = learned[name]
            heads, depth = encoder.config.heads, encoder.config.num_hidden_layers
            if prefix.shape[3:] != heads or not set(layers) <= set(range(depth)):
                theirs = f"[heads, head_dim] {[*prefix.shape[3:]]} in layers {[*layers]}"
                return f"{theirs}, but the text encoder has {[*heads]} in layers 0 to {depth - 1}"
        if len(learned) != len(networks.text):
            return f"prefixes for {len(learned)} text encoders, but there are {len(networks.text)}"
        return None

    def first_layers(self, networks: Networks) -> tuple[int, ...]:
        return tuple(layers[0] for layers in self.layers)

    def token_mask(self, last: Int[np.ndarray, "T"], length: int) -> Bool[np.ndarray, "T {length} 1"]:
        if self.scope == "all":
            return np.ones((len(last), length, 1), bool)
        last = last[:, None, None]
        return (last >= 0) & (np.arange(length)[:, None] >= last)

    def apply_to_prompts(
        self, learned: Params, prompts: tuple[PromptStates, ...], strength: Float[Array, ""] | float
    ) -> tuple[tuple[PromptStates, ...], Sequence[Prefix]]:
        # The prompts stay as they are: the prefix acts inside the layers' attention.
        of_each = zip(of_encoders("prefix", len(prompts)), prompts, self.layers, strict=True)
        return prompts, [
            Prefix(
                self.learned_parts(learned[name]), self.logit_bias, jnp.float32(strength), of_encoder.token_mask, layers
            )
            for name, of_encoder, layers in of_each
        ]

    def learned_parts(self, prefix: Float[Array, "P L 2 H D"]) -> Float[Array, "P L 2 H D"]:
        """Sets the parts of a prefix that are not trained to 0, which also stops their gradient."""
        fixed = [i for i, part in enumerate(PARTS) if part not in self.parts]
        return prefix.at[:, :, jnp.asarray(fixed)].set(0) if fixed else prefix
