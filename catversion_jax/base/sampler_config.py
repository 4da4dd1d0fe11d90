"""How images are sampled: the settings of the sampler, which a concept's file records."""

from dataclasses import dataclass

from catversion_jax.base.schedulers import SCHEDULERS
from catversion_jax.utils.settings import at_least, between, one_of, setting


@dataclass(frozen=True)
class SamplerConfig:
    """The scheduler, its steps and the guidance."""

    steps: int = setting(50, "sampling steps", between(1, 1000))
    guidance: float = setting(7.5, "scale of classifier-free guidance; 1: none", at_least(0))
    # The last batch is filled up, so that one program serves all.
    batch_size: int = setting(4, "images at once", at_least(1))
    scheduler: str = setting(
        "",
        f'one of {", ".join(SCHEDULERS)}; "": the one that the model\'s scheduler_config.json names',
        one_of(SCHEDULERS, unset=True),
    )
