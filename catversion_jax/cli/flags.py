"""Flags that several commands share, and the values given for them."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress

from absl import flags
from ml_collections import ConfigDict, config_flags

from catversion_jax.base.pipeline import DTYPES
from catversion_jax.base.sampler_config import MAX_STRENGTH, SamplerConfig
from catversion_jax.base.schedulers import SCHEDULERS
from catversion_jax.config import Config, from_config_dict
from catversion_jax.config.shipped import config_names
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.concept_model import recorded_sampler
from catversion_jax.methods.model_names import is_on_hub
from catversion_jax.utils.errors import UserError, listed, refused
from catversion_jax.utils.files import read_text
from catversion_jax.utils.paths import AnyPath, expand, make_folder
from catversion_jax.utils.settings import broken, is_text

flags.disclaim_key_flags()  # flags that are defined here count as the calling command's

MAX_PROMPTS_BYTES = 2**20
MAX_PROMPTS = 10_000
MAX_PROMPT_LENGTH = 4096  # characters; a text encoder sees 77 tokens
MAX_IMAGES = 10_000  # of a prompt
CONFIG_HELP = f"Config: a file, or one of {', '.join(config_names())}; --config.KEY=VALUE overrides a key."


def define_config(default: str | None = None, help: str = CONFIG_HELP) -> None:
    config_flags.DEFINE_config_file("config", default, help)


def given_config(arguments: flags.FlagValues) -> ConfigDict:
    """Returns the value of --config, unchecked. Raises UserError if it is missing."""
    if arguments.config is None:
        raise UserError("--config: missing; expected a config, such as --config=mini")
    return arguments.config


def checked_config(arguments: flags.FlagValues, unset: tuple[str, ...] = ()) -> Config:
    """Returns the checked value of --config. Dotted keys in `unset` may have no value."""
    return from_config_dict(given_config(arguments), unset)


def define_embedding(several: bool = False) -> None:
    """Defines --embedding and its alias --concept; with `several`, it may be repeated."""
    what = "Run directory of catversion train, its concept.safetensors, or its name on Hugging Face (owner/name)"
    repeat = "; may be repeated, for several concepts" if several else ""
    flags.DEFINE_multi_string("embedding", [], f"{what}{repeat}.")
    flags.DEFINE_alias("concept", "embedding")


def given_embedding(arguments: flags.FlagValues) -> str:
    """Returns the one value of --embedding, "" without one. Raises UserError if there are several."""
    given = arguments.embedding
    if len(given) > 1:
        raise UserError(f"--embedding: {listed(given)}; expected one; only generate and export take several")
    return given[0] if given else ""


def given_concepts(arguments: flags.FlagValues) -> dict[str, Concept]:
    """Returns the concepts of --embedding, by their sources. Raises UserError if it is missing or names one twice."""
    given = [str(expand(path)) for path in arguments.embedding]
    if not given or "" in arguments.embedding:
        raise UserError("--embedding: missing; expected a run directory of catversion train")
    if twice := [path for path in given if given.count(path) > 1]:
        raise UserError(f"--embedding: {twice[0]} twice; expected each concept once")
    return {path: load_concept(path) for path in given}


def load_concept(source: str) -> Concept:
    """Returns the concept of a path or, if there is no such folder here, of a name on Hugging Face."""
    # A name like runs/mug, beside the folder of runs, is a path that was misspelt.
    if is_on_hub(source) and not expand(source.split("/")[0]).exists():
        return Concept.from_pretrained(source)
    return concept_file.load(source)


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
    if len(prompts) > MAX_PROMPTS:
        raise UserError(f"{len(prompts)} prompts; expected at most {MAX_PROMPTS}; give the others in another call")
    if not all(map(is_text, prompts)):
        raise UserError("--prompt: one holds a NUL or half of a character; expected text in UTF-8")
    if long := [prompt for prompt in prompts if len(prompt) > MAX_PROMPT_LENGTH]:
        raise UserError(f"prompt {long[0]:.60}...: {len(long[0])} characters; expected at most {MAX_PROMPT_LENGTH}")
    return prompts


def read_prompts(path: AnyPath) -> list[str]:
    text = read_text(path, MAX_PROMPTS_BYTES, "--prompts_file takes a text file, one prompt a line")
    # Not splitlines, which also splits at characters that may be in a prompt; files that were joined have marks inside.
    return text.replace("\ufeff", "").replace("\r", "\n").split("\n")


def define_strength() -> None:
    flags.DEFINE_float(
        "strength",
        None,
        f"Strength of the concept: 0 is the base model, 1 as trained, {MAX_STRENGTH:g} twice what training changed; if "
        "not set, as recorded in the concept.",
    )


def define_model() -> None:
    flags.DEFINE_string(
        "model",
        None,
        "Base model: a folder, a file or a name on Hugging Face; if not set, the one the concept was trained on.",
    )


def define_lora() -> None:
    flags.DEFINE_multi_string(
        "lora",
        [],
        "LoRA of kohya or diffusers to merge into the base model, with its scale: FILE:0.8, or FILE for 1; may be "
        "repeated.",
    )


def given_loras(arguments: flags.FlagValues) -> list[tuple[str, float]]:
    """Returns the files of --lora with their scales. Raises UserError for an empty one."""
    loras = []
    for given in arguments.lora:
        path, scale = given, 1.0
        head, colon, tail = given.rpartition(":")
        with suppress(ValueError):
            path, scale = (head, float(tail)) if colon else (given, 1.0)
        if not path:
            raise UserError(f"--lora={given}: no file; expected FILE:SCALE, such as style.safetensors:0.8")
        loras.append((path, scale))
    return loras


def define_dtype(default: str | None, meaning: str = "") -> None:
    flags.DEFINE_enum("dtype", default, list(DTYPES), f"Dtype of the networks{meaning}.")


def define_sampling(images_per_prompt: int = 4) -> None:
    """Defines the flags of the sampler, the base model and the seeds."""
    recorded = "if not set, as recorded in the concept"
    scale = f"Scale of classifier-free guidance, 1 for none; {recorded}, or {SamplerConfig.guidance}."
    steps = f"Number of sampling steps; {recorded}, or {SamplerConfig.steps}."
    flags.DEFINE_float("guidance", None, scale)
    flags.DEFINE_string(
        "scheduler", None, f"Sampling scheduler: one of {', '.join(SCHEDULERS)}; {recorded}, or the model's own."
    )
    flags.DEFINE_integer("steps", None, steps, lower_bound=1, upper_bound=1000)
    define_strength()
    define_model()
    flags.DEFINE_integer("num", images_per_prompt, "Number of images per prompt.", 1, MAX_IMAGES)
    flags.DEFINE_integer(
        "seed", 0, "Seed of each prompt's first image; the next ones count up.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer("batch_size", SamplerConfig.batch_size, "Number of images sampled at once.", lower_bound=1)


def given_sampler(arguments: flags.FlagValues, concepts: Mapping[str, Concept]) -> SamplerConfig:
    """Returns the sampler's settings: those of the flags and, for flags not given, those that the concepts record."""
    given = {name: getattr(arguments, name) for name in concept_file.SAMPLER}
    changes = {name: value for name, value in given.items() if value is not None}
    recorded = SamplerConfig() if len(changes) == len(given) else recorded_sampler(concepts)
    sampler = dataclasses.replace(recorded, **changes, batch_size=arguments.batch_size)
    for name, value, expected in broken(sampler):
        raise UserError(f"--{name}={value}: expected {expected}")
    return sampler


def given_strength(arguments: flags.FlagValues) -> float | None:
    """Returns the value of --strength, None if it is not given. Raises UserError if it is out of range or NaN."""
    strength = arguments.strength
    if strength is not None and not 0 <= strength <= MAX_STRENGTH:
        expected = f"0 (the base model) to {MAX_STRENGTH:g}; 1 is as trained"
        raise UserError(f"--strength={strength}: expected {expected}")
    return strength


def given_seeds(arguments: flags.FlagValues) -> tuple[int, ...]:
    """Returns the seeds, one for each image of a prompt."""
    return tuple((arguments.seed + i) % 2**32 for i in range(arguments.num))


def make_out(path: AnyPath) -> AnyPath:
    """Makes a folder that a flag names. Raises UserError if that fails."""
    with refused(f"{path}: cannot be made", "--out takes a folder"):
        make_folder(path)
    return path
