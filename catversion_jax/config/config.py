"""The complete config: all sections, and the conversion to and from the ConfigDict that flags and files change."""

import dataclasses
import json
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from jax import Device
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_dict

from catversion_jax.base.pipeline import ModelConfig, Networks
from catversion_jax.config.sections import BatchConfig, CheckpointConfig, SampleConfig, StopConfig, TrainConfig
from catversion_jax.data.photos import DataConfig
from catversion_jax.data.prompts import ConceptConfig, fill
from catversion_jax.methods.base import Method
from catversion_jax.methods.hyperparameters import AdapterConfig, Hyperparameters, PriorConfig
from catversion_jax.methods.registry import METHODS
from catversion_jax.models.sharding import MeshConfig, make_mesh
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import between, check_settings, flatten, one_of, replaced, setting, text


@dataclass(frozen=True)
class Config:
    """All settings of a run; the defaults are the paper's, on the embedded mini model."""

    run_dir: str = setting(
        "", "Folder that everything is written to; train and batch require it.", text("a folder to write to")
    )
    seed: int = setting(0, "Seed of all random numbers.", between(0, 2**32 - 1, "0 to 2^32 - 1"))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    concept: ConceptConfig = field(default_factory=ConceptConfig)
    method: str = setting("catversion", f"Personalization method: one of {', '.join(METHODS)}.", one_of(METHODS))
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def replaced(self, changes: dict[str, Any]) -> "Config":
        """Returns the config with the values of some dotted keys changed."""
        return replaced(self, changes)

    def make_method(self, networks: Networks) -> Method:
        """Builds the configured method for a base model's networks."""
        hyperparameters = Hyperparameters(self.adapter, self.prior, self.concept.identifier)
        return METHODS[self.method].from_hyperparameters(hyperparameters, networks)

    def make_mesh(self, concepts: int = 1, devices: list[Device] | None = None) -> Mesh:
        """Returns the device mesh of a training step of `concepts` concepts, over this process's devices or others."""
        return make_mesh(concepts, self.train.batch_size, self.mesh.fsdp, self.mesh.tensor, devices)

    def sample_prompts(self, count: int | None = None) -> list[str]:
        """Returns the prompts of the sample grid, or the first `count` of them."""
        return self.concept.prompts(self.sample.prompts[:count])

    def identity(self) -> dict[str, Any]:
        """Returns the dotted keys and values that a run's folder records, without run_dir: a folder may be moved."""
        values = {key: value for key, _, value in flatten(self) if key != "run_dir"}
        # Through JSON, so that tuples become lists, as in the file that this is compared with.
        return json.loads(json.dumps(values, sort_keys=True))


def to_config_dict(settings: Any) -> ConfigDict:
    """Converts a settings dataclass to the ConfigDict that configs/*.py change and --config.KEY=VALUE overrides."""
    types = typing.get_type_hints(type(settings))
    values = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif value is None:  # a placeholder keeps the type that a later value must have
            (kind,) = set(typing.get_args(types[entry.name])) - {type(None)}
            value = config_dict.placeholder(kind)
        values[entry.name] = value
    return ConfigDict(values)


def from_config_dict(values: ConfigDict, unset: Collection[str] = ()) -> Config:
    """Converts a ConfigDict to the checked config. Dotted keys in `unset` may have no value yet.

    Raises UserError for the first invalid value, before anything is read or compiled."""
    config = typed(Config, values)
    check_settings(config, unset)
    for template in (*config.concept.templates, *config.sample.prompts):
        fill(template, config.concept.class_word, "a")
    return config


def typed(kind: type, values: ConfigDict, prefix: str = "config.") -> Any:
    """Converts a ConfigDict to a settings dataclass. Raises UserError for a key that is unknown or misplaced."""
    fields = {entry.name for entry in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    if unknown := sorted(set(values.keys()) - fields):
        raise UserError(f"{prefix}{unknown[0]}: no such key; expected one of {', '.join(sorted(fields))}")
    given = {}
    for name, value in values.items():
        is_section, has_keys = dataclasses.is_dataclass(types[name]), isinstance(value, ConfigDict)
        if is_section != has_keys:
            expected = "a section with keys" if is_section else "a value"
            raise UserError(f"{prefix}{name}: expected {expected}, not {'keys' if has_keys else repr(value)}")
        given[name] = typed(types[name], value, f"{prefix}{name}.") if is_section else hashable(value)
    return kind(**given)


def hashable(value: Any) -> Any:
    """Turns lists, which a config file may hold, into tuples: settings are static arguments of jitted functions."""
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


OF_A_RUN = ("run_dir", "data.dir", "concept.class_word")
"""Keys that a run requires, and a command that makes its runs itself does not."""


def default() -> ConfigDict:
    """Returns a ConfigDict with every key at its default, from which a file in configs/ starts."""
    return to_config_dict(Config())
