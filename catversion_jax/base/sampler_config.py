"""The sampler's settings, which a concept's file records."""

from dataclasses import dataclass

from catversion_jax.base.schedulers import SCHEDULERS
from catversion_jax.utils.settings import between, one_of, setting

MAX_STRENGTH = 2.0
"""Strength of a concept that is sampled with, at most: what its training changed, counted twice."""


@dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled: scheduler, number of steps, guidance and batch size."""

    steps: int = setting(50, "Number of sampling steps.", between(1, 1000))
    guidance: float = setting(7.5, "Scale of classifier-free guidance; 1 turns it off.", between(0, 100))
    # The last batch is padded to this size, so that one compiled program serves all.
    batch_size: int = setting(4, "Number of images sampled at once.", between(1, 1024))
    scheduler: str = setting(
        "",
        f'Sampling scheduler: one of {", ".join(SCHEDULERS)}; "" means the one in scheduler_config.json.',
        one_of(SCHEDULERS, unset=True),
    )
