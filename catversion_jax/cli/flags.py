"""Flags that several commands share, and the values given for them."""

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
from catversion_jax.utils.errors import UserError, is_storage_error
from catversion_jax.utils.files import expand

flags.disclaim_key_flags()  # flags that are defined here count as the calling command's

MAX_PROMPTS_BYTES = 2**20
CONFIG_HELP = "Config file, such as configs/mini.py; --config.KEY=VALUE overrides a key."


def define_config(default: str | None = None, help: str = CONFIG_HELP) -> None:
    config_flags.DEFINE_config_file("config", default, help)


def given_config(arguments: flags.FlagValues) -> ConfigDict:
    """Returns the value of --config, unchecked. Raises UserError if it is missing."""
    if arguments.config is None:
        raise UserError("--config: missing; expected a config file, such as --config=configs/mini.py")
    return arguments.config


def checked_config(arguments: flags.FlagValues, unset: tuple[str, ...] = ()) -> Config:
    """Returns the checked value of --config. Dotted keys in `unset` may have no value."""
    return from_config_dict(given_config(arguments), unset)


def define_embedding(several: bool = False) -> None:
    """Defines --embedding and its alias --concept; with `several`, it may be repeated."""
    what = "Run directory of catversion train, or its concept.safetensors"
    if several:
        flags.DEFINE_multi_string("embedding", [], f"{what}; repeat it for several concepts in one prompt.")
    else:
        flags.DEFINE_string("embedding", None, f"{what}.")
    flags.DEFINE_alias("concept", "embedding")


def given_concepts(arguments: flags.FlagValues) -> dict[str, Concept]:
    """Returns the concepts of --embedding, by their sources. Raises UserError if it is missing."""
    given = arguments.embedding
    if not given:
        raise UserError("--embedding: missing; expected a run directory of catversion train")
    return {str(path): concept_file.load(path) for path in map(expand, [given] if isinstance(given, str) else given)}


def define_prompts(help: str) -> None:
    flags.DEFINE_multi_string("prompt", [], help)
    flags.DEFINE_string("prompts_file", None, "UTF-8 text file with one prompt per line.")


def given_prompts(arguments: flags.FlagValues) -> list[str]:
    """Returns the prompts of --prompt and --prompts_file, each once. Raises UserError if there are none."""
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
        raise UserError(f"{path}: {error.strerror}; --prompts_file takes a text file, one prompt a line") from error
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected one prompt a line") from None


def define_strength() -> None:
    flags.DEFINE_float(
        "strength", 1.0, "Concept strength: 1 is as learned, 0 is the base model.", lower_bound=0, upper_bound=1
    )


def define_model() -> None:
    flags.DEFINE_string(
        "model",
        None,
        "Base model: a folder, a file or a name on Hugging Face; if not set, the one the concept was trained on.",
    )


def define_sampling(images_per_prompt: int = 4) -> None:
    """Defines the flags of the sampler, the base model and the seeds."""
    recorded = "if not set, as recorded in the concept"
    scale = f"Scale of classifier-free guidance, 1 for none; {recorded}, or {SamplerConfig.guidance}."
    steps = f"Number of sampling steps; {recorded}, or {SamplerConfig.steps}."
    flags.DEFINE_float("guidance", None, scale, lower_bound=0)
    flags.DEFINE_string(
        "scheduler", None, f"Sampling scheduler: one of {', '.join(SCHEDULERS)}; {recorded}, or the model's own."
    )
    flags.DEFINE_integer("steps", None, steps, lower_bound=1, upper_bound=1000)
    define_strength()
    define_model()
    flags.DEFINE_enum("dtype", ModelConfig.dtype, list(DTYPES), "Dtype of the text encoder and the UNet.")
    flags.DEFINE_integer("num", images_per_prompt, "Number of images per prompt.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Seed of each prompt's first image; the next ones count up.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer("batch_size", SamplerConfig.batch_size, "Number of images sampled at once.", lower_bound=1)


def given_sampler(arguments: flags.FlagValues, concepts: Mapping[str, Concept]) -> SamplerConfig:
    """Returns the sampler's settings: those of the flags and, for flags not given, those that the concepts record."""
    given = {name: getattr(arguments, name) for name in concept_file.SAMPLER}
    changes = {name: value for name, value in given.items() if value is not None}
    recorded = SamplerConfig() if len(changes) == len(given) else recorded_sampler(concepts)
    return dataclasses.replace(recorded, **changes, batch_size=arguments.batch_size)


def given_seeds(arguments: flags.FlagValues) -> tuple[int, ...]:
    """Returns the seeds, one for each image of a prompt."""
    return tuple((arguments.seed + i) % 2**32 for i in range(arguments.num))


def make_folder(path: Path) -> Path:
    """Makes a folder that a flag names. Raises UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_storage_error(error):
            raise
        raise UserError(f"{path}: cannot be made ({error.strerror}); --out takes a folder") from error
    return path
