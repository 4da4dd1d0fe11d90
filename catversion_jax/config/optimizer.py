"""AdamW: its hyperparameters, and the gradient transformation and learning rate schedule made from them."""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from catversion_jax.utils.settings import at_least, more_than, one_of, optional, setting, share
from catversion_jax.utils.types import AnyArray, Array, Float, Int

DECAYS = {
    "constant": lambda progress: jnp.ones_like(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}
"""Learning rate schedule -> its factor at the progress, in [0, 1], after the warm-up."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's hyperparameters (Loshchilov and Hutter 2019)."""

    learning_rate: float = setting(
        1e-2, "Peak learning rate, used as it is: not scaled by the batch size.", more_than(0)
    )
    decay: str = setting(
        "constant", f"Learning rate schedule after the warm-up: one of {', '.join(DECAYS)}.", one_of(DECAYS)
    )
    warmup_steps: int = setting(
        0, "Number of steps in which the learning rate rises linearly to its peak.", at_least(0)
    )
    b1: float = setting(0.9, "AdamW's decay rate of the gradient's running mean.", share())
    b2: float = setting(0.999, "AdamW's decay rate of the squared gradient's running mean.", share())
    eps: float = setting(1e-8, "AdamW's epsilon, added to the root of the squared gradient's mean.", more_than(0))
    weight_decay: float = setting(0.01, "AdamW's weight decay, multiplied by the learning rate.", at_least(0))
    clip_norm: float | None = setting(
        None, "Norm that each concept's gradient is clipped to; None turns clipping off.", optional(more_than(0))
    )

    def transformation(self) -> optax.GradientTransformation:
        """Returns AdamW at rate 1, after gradient clipping if that is set; `learning_rate_at` scales its updates."""
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(clip, optax.adamw(1.0, self.b1, self.b2, self.eps, weight_decay=self.weight_decay))

    def learning_rate_at(self, step: Int[AnyArray, "C"], steps: Int[AnyArray, "C"]) -> Float[Array, "C"]:
        """Returns the learning rate of update `step` (from 0) in a schedule of `steps` updates."""
        warmup = jnp.minimum(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = jnp.clip((step - self.warmup_steps) / jnp.maximum(1, steps - self.warmup_steps), 0, 1)
        return self.learning_rate * warmup * DECAYS[self.decay](progress)
