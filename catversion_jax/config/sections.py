"""The sections of the config that belong to training; the others stand beside what they configure."""

import dataclasses
from dataclasses import dataclass

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.config.optimizer import OptimizerConfig
from catversion_jax.utils.settings import YES_OR_NO, at_least, between, optional, setting, several, share


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """The training loop; the optimizer's settings are of the same section."""

    steps: int = setting(1000, "training steps, and the length of the learning rate's schedule", at_least(1))
    batch_size: int = setting(2, "photos in each step", at_least(1))
    background_weight: float = setting(
        1.0, "of what the photos' masks leave out, in the loss; the subject's is 1", between(0, 1)
    )
    remat: bool = setting(False, "compute layers again for the gradient: less memory, more time", YES_OR_NO)
    steps_per_dispatch: int | None = setting(None, "None: 1 on a CPU, 10 elsewhere", optional(at_least(1)))

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's share: what a compiled step depends on."""
        names = [field.name for field in dataclasses.fields(OptimizerConfig)]
        return OptimizerConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class StopConfig:
    """When a concept has learned enough: its loss on fixed photos, noise and timesteps has not fallen any more."""

    every: int = setting(0, "steps from one evaluation to the next; 0: no early stop", at_least(0, "none"))
    patience: int = setting(2, "evaluations without a lower loss after which a concept stops", at_least(1))
    margin: float = setting(
        0.0, "share of the lowest loss by which a lower one must be lower to count", share("0 to less than 1")
    )


@dataclass(frozen=True)
class BatchConfig:
    """Many concepts at once."""

    slots: int = setting(8, "concepts in one step of `catversion batch`", at_least(1))


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the state of training is saved."""

    every: int = setting(100, "steps from one checkpoint to the next", at_least(1))
    keep: int = setting(3, "checkpoints kept; older ones are removed", at_least(1))


@dataclass(frozen=True)
class SampleConfig(SamplerConfig):
    """The validation images and the sample grid; the sampler's settings are of the same section."""

    every: int = setting(0, "steps from one set of validation images to the next; 0: none", at_least(0, "none"))
    prompts: tuple[str, ...] = setting(
        ("a photo of {concept} on the beach", "a photo of {concept} in the snow"),
        "templates of the sample grid; {concept} is article and class word, {class_word} the word alone",
        several("prompt"),
    )

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler's share."""
        names = [field.name for field in dataclasses.fields(SamplerConfig)]
        return SamplerConfig(**{name: getattr(self, name) for name in names})
