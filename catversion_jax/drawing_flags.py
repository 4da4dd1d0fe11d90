"""The flags of every command that draws pictures, and what they ask for."""

from absl import flags

from catversion_jax.pipeline import DTYPES
from catversion_jax.sampling import SamplerConfig
from catversion_jax.schedulers import SCHEDULERS


def define(pictures_per_prompt: int = 4) -> None:
    """The command lists them as its own with `flags.adopt_module_key_flags(drawing_flags)`."""
    flags.DEFINE_float("guidance", 5.0, "Scale of classifier-free guidance; 1: none.", lower_bound=0)
    flags.DEFINE_string("scheduler", "", f"One of {', '.join(SCHEDULERS)}. Default: the model's own.")
    flags.DEFINE_integer("steps", 30, "Of the scheduler.", lower_bound=1, upper_bound=1000)
    flags.DEFINE_float("strength", 1.0, "Of the concept, 0 to 1; 0: the base model.", lower_bound=0, upper_bound=1)
    flags.DEFINE_string("model", None, "The base model. Default: the one the concept was learned on.")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the computation.")
    flags.DEFINE_integer("num", pictures_per_prompt, "Pictures per prompt.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Of each prompt's first picture; the next ones count up.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer("batch_size", 4, "Pictures at once.", lower_bound=1)


def sampler(arguments: flags.FlagValues) -> SamplerConfig:
    return SamplerConfig(arguments.steps, arguments.guidance, arguments.batch_size, arguments.scheduler)


def seeds(arguments: flags.FlagValues) -> tuple[int, ...]:
    """One for each picture of a prompt."""
    return tuple((arguments.seed + i) % 2**32 for i in range(arguments.num))
