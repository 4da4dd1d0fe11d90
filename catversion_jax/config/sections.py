"""The config's sections for training and checkpoints; the others are defined beside the code that they configure."""

from dataclasses import dataclass

from catversion_jax.base.sampler_config import MAX_STRENGTH, SamplerConfig
from catversion_jax.config.optimizer import OptimizerConfig
from catversion_jax.utils.settings import (
    YES_OR_NO,
    Constraint,
    at_least,
    between,
    optional,
    part_of,
    setting,
    several_texts,
    share,
)


def part_of_schedule() -> Constraint:
    """A range of shares of the noise schedule."""

    def is_range(value) -> bool:
        are_numbers = isinstance(value, tuple) and all(isinstance(x, int | float) for x in value)
        return are_numbers and len(value) == 2 and 0 <= value[0] < value[1] <= 1

    return Constraint(is_range, "two numbers from 0 to 1 that ascend, such as (0.5, 1.0)")


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
    """The training loop and its optimizer, which share this section."""

    steps: int = setting(
        1000, "Number of training steps, and the length of the learning rate schedule.", between(1, 2**31 - 1)
    )
    batch_size: int = setting(2, "Number of photos per concept in each step.", between(1, 2**20))
    timesteps: tuple[float, float] = setting(
        (0.0, 1.0),
        "Range of the noise schedule that timesteps are drawn from, in shares: 0 is clean and 1 is noise.",
        part_of_schedule(),
    )
    background_weight: float = setting(
        1.0, "Loss weight of what the photos' masks leave out; the subject's weight is 1.", between(0, 1)
    )
    text_penalty: float = setting(
        0.0,
        "Loss weight of the squared change of a prompt's text states, relative to the base model's; keeps the class.",
        at_least(0, "none"),
    )
    remat: bool = setting(False, "Recompute the UNet's layers in the backward pass: less memory, more time.", YES_OR_NO)
    steps_per_dispatch: int | None = setting(
        None, "Number of training steps per dispatch; None means 1 on a CPU and 10 elsewhere.", optional(at_least(1))
    )

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's settings alone: a compiled step must not depend on the rest of the section."""
        return part_of(self, OptimizerConfig)


@dataclass(frozen=True)
class StopConfig:
    """Early stopping: a concept stops when its loss on fixed photos, noise and timesteps no longer falls."""

    every: int = setting(0, "Number of steps between evaluations; 0 turns early stopping off.", at_least(0, "none"))
    patience: int = setting(
        2, "Number of consecutive evaluations without improvement after which a concept stops.", at_least(1)
    )
    margin: float = setting(
        0.0,
        "Relative decrease below the lowest loss that counts as an improvement, such as 0.01.",
        share("0 to less than 1"),
    )


@dataclass(frozen=True)
class BatchConfig:
    """`catversion batch`: many concepts at once."""

    slots: int = setting(8, "Number of concepts trained side by side in one step of catversion batch.", at_least(1))
    previews: int = setting(
        2, "Number of prompts sampled for each concept's preview.png in catversion batch; 0 turns it off.", at_least(0)
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the training state is saved."""

    every: int = setting(100, "Number of steps between checkpoints.", at_least(1))
    keep: int = setting(3, "Number of checkpoints kept; older ones are deleted.", at_least(1))


@dataclass(frozen=True)
class SampleConfig(SamplerConfig):
    """The validation images, the sample grid and their sampler, which share this section."""

    strength: float = setting(
        1.0,
        "Strength that the concept is sampled with: 0 is the base model, 1 as trained; concept.safetensors records it.",
        between(0, MAX_STRENGTH),
    )
    every: int = setting(0, "Number of steps between sets of validation images; 0 turns them off.", at_least(0, "none"))
    prompts: tuple[str, ...] = setting(
        ("a photo of {concept} on the beach", "a photo of {concept} in the snow"),
        "Prompt templates of the sample grid; {concept} is article and class word, {class_word} the word alone.",
        several_texts("prompt"),
    )

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler's settings alone, as a concept's file records them."""
        return part_of(self, SamplerConfig)
