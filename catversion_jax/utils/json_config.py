"""Reads a `config.json` of diffusers or transformers into a module's frozen dataclass."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from msgspec import Meta

from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.records import convert

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")

# The bounds are far above every published model. They stop a damaged file before a network of its sizes is traced.
Width = Annotated[int, Meta(ge=1, le=2**16)]
"""Channels, heads, or tokens of a prompt."""
Depth = Annotated[int, Meta(ge=1, le=128)]
"""Layers of a network, or of a block."""
Side = Annotated[int, Meta(ge=1, le=2**11)]
"""The side of a picture, of a patch or of latents."""
Positive = Annotated[float, Meta(gt=0, le=2**16)]
"""An epsilon or a scale."""


def not_in_file(default: Any) -> Any:
    """Declares a field that we set: a key of its name in a file means something else, or nothing."""
    return dataclasses.field(default=default, metadata={"in_file": False})


def from_json(cls: type[ConfigT], json: Mapping[str, Any], fixed: Mapping[str, Any], **overrides) -> ConfigT:
    """Builds the dataclass `cls` from the keys of `json` that it declares; lists become tuples.

    `fixed` maps a key to the only value that our modules implement: any other value would be a different network.
    Raises UserError, listing the keys that differ, or naming the first value of another type or out of bounds.
    """
    wrong = [f"{key}={json[key]!r} (only {value!r})" for key, value in fixed.items() if json.get(key, value) != value]
    name = json.get("_class_name", cls.__name__)
    if wrong:
        raise UserError(f"{name}: not supported: {listed(wrong)}")
    names = {field.name for field in dataclasses.fields(cls) if field.metadata.get("in_file", True)} & json.keys()
    values = {key: json[key] for key in names}
    return convert(values | overrides, cls, str(name), "expected the config.json of a supported model")


def require(holds: bool, what: str) -> None:
    """Raises ValueError, which from_json reports as a UserError, unless fields of a config fit each other."""
    if not holds:
        raise ValueError(what)
