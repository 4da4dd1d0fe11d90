"""Flags that several commands share, and what they ask for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from catversion_jax.base.pipeline import DTYPES, ModelConfig
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.base.schedulers import SCHEDULERS
from catversion_jax.config import Config, from_config_dict
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.concept_model import recorded_sampler
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import expand

flags.disclaim_key_flags()  # what is defined here is the calling command's

MAX_PROMPTS_BYTES = 2**20
CONFIG_HELP = "A file of configs/, such as configs/mini.py; --config.KEY=VALUE changes a key."


def define_config(default: str | None = None, help: str = CONFIG_HELP) -> None:
    config_flags.DEFINE_config_file("config", default, help)


def given_config(arguments: flags.FlagValues) -> ConfigDict:
    """The value of --config, unchecked."""
    if arguments.config is None:
        raise UserError("--config: missing; expected a config file, such as --config=configs/mini.py")
    return arguments.config


def checked_config(arguments: flags.FlagValues, unset: tuple[str, ...] = ()) -> Config:
    """The value of --config. Dotted keys in `unset` may have no value."""
    return from_config_dict(given_config(arguments), unset)


def define_embedding(several: bool = False) -> None:
    """--embedding, or --concept: learned concepts."""
    what = "A run directory of catversion train, or its concept.safetensors"
    if several:
        flags.DEFINE_multi_string("embedding", [], f"{what}; given several times: concepts of one prompt.")
    else:
        flags.DEFINE_string("embedding", None, f"{what}.")
    flags.DEFINE_alias("concept", "embedding")


def given_concepts(arguments: flags.FlagValues) -> dict[str, Concept]:
    """The concepts of --embedding, by their sources."""
    given = arguments.embedding
    if not given:
        raise UserError("--embedding: missing; expected a run directory of catversion train")
    return {str(path): concept_file.load(path) for path in map(expand, [given] if isinstance(given, str) else given)}


def define_prompts(help: str) -> None:
    flags.DEFINE_multi_string("prompt", [], help)
    flags.DEFINE_string("prompts_file", None, "A text file with one prompt a line.")


def given_prompts(arguments: flags.FlagValues) -> list[str]:
    """The prompts of --prompt and --prompts_file, each once."""
    prompts = list(arguments.prompt)
    if arguments.prompts_file:
        prompts += read_prompts(expand(arguments.prompts_file))
    prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    if not prompts:
        raise UserError("--prompt: missing; expected a prompt with the class word, or --prompts_file")
    return prompts


def read_prompts(path: Path) -> list[str]:
    try:
        if path.stat().st_size > MAX_PROMPTS_BYTES:
            raise UserError(f"{path}: larger than 1 MiB; expected one prompt a line")
        return path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --prompts_file takes a text file, one prompt a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected one prompt a line") from None


def define_strength() -> None:
    flags.DEFINE_float(
        "strength", 1.0, "Concept strength: 1 is as learned, 0 the base model.", lower_bound=0, upper_bound=1
    )


def define_model() -> None:
    flags.DEFINE_string("model", None, "The base model. Default: the one the concept was trained on.")


def define_sampling(images_per_prompt: int = 4) -> None:
    """How images are sampled."""
    recorded = "Default: the one that the concept's run was judged with"
    flags.DEFINE_float("guidance", None, f"Scale of classifier-free guidance; 1: none. {recorded}.", lower_bound=0)
    flags.DEFINE_string("scheduler", None, f"One of {', '.join(SCHEDULERS)}. {recorded}, or the model's own.")
    flags.DEFINE_integer("steps", None, f"Number of sampling steps. {recorded}.", lower_bound=1, upper_bound=1000)
    define_strength()
    define_model()
    flags.DEFINE_enum("dtype", ModelConfig.dtype, list(DTYPES), "Of the computation.")
    flags.DEFINE_integer("num", images_per_prompt, "Images per prompt.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Of each prompt's first image; the next ones count up.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer("batch_size", SamplerConfig.batch_size, "Images at once.", lower_bound=1)


def given_sampler(arguments: flags.FlagValues, concepts: Mapping[str, Concept]) -> SamplerConfig:
    """The sampler's settings: the flags', and for what they do not say the concepts'."""
    given = {name: getattr(arguments, name) for name in concept_file.SAMPLER}
    changes = {name: value for name, value in given.items() if value is not None}
    recorded = SamplerConfig() if len(changes) == len(given) else recorded_sampler(concepts)
    return dataclasses.replace(recorded, **changes, batch_size=arguments.batch_size)


def given_seeds(arguments: flags.FlagValues) -> tuple[int, ...]:
    """One for each image of a prompt."""
    return tuple((arguments.seed + i) % 2**32 for i in range(arguments.num))


def make_folder(path: Path, flag: str = "--out") -> Path:
    """Makes a folder that a flag names."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); {flag} takes a folder") from None
    return path
