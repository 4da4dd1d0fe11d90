"""Reads a `config.json` of diffusers or transformers into a module's frozen dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from catversion_jax.utils.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def from_json(cls: type[ConfigT], json: Mapping[str, Any], fixed: Mapping[str, Any], **overrides) -> ConfigT:
    """Builds the dataclass `cls` from the keys of `json` that it declares; lists become tuples.

    `fixed` maps a key to the only value that our modules implement: any other value would be a different network.
    Raises UserError, listing the keys that differ.
    """
    wrong = [f"{key}={json[key]!r} (only {value!r})" for key, value in fixed.items() if json.get(key, value) != value]
    if wrong:
        raise UserError(f"{json.get('_class_name', cls.__name__)}: not supported: {', '.join(wrong)}")
    names = {field.name for field in dataclasses.fields(cls)} & json.keys()
    values = {name: tuple(json[name]) if isinstance(json[name], list) else json[name] for name in names}
    return cls(**(values | overrides))
