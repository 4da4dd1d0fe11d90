"""Settings: frozen dataclasses whose fields carry a default, a help text and a constraint for their values.

A setting is defined once, in the dataclass of the module that uses it. The config, its flags, its help and its checks
are generated from these fields.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from catversion_jax.utils.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


@dataclass(frozen=True)
class Constraint:
    """The values that a setting accepts, as a predicate and as a phrase that follows "expected"."""

    holds: Callable[[Any], bool]
    expected: str


def setting(default: Any, help: str, constraint: Constraint) -> Any:
    """Declares a field of a settings dataclass."""
    return dataclasses.field(default=default, metadata={"help": help, "constraint": constraint})


def at_least(least: float, meaning: str = "") -> Constraint:
    """A finite number of at least `least`; `meaning` says what `least` itself stands for."""
    words = f"{least} ({meaning}) or more" if meaning else f"at least {least}"
    return Constraint(lambda value: least <= value < math.inf, words)


def more_than(bound: float) -> Constraint:
    """A finite number above `bound`."""
    return Constraint(lambda value: bound < value < math.inf, f"more than {bound}")


def between(least: float, most: float, words: str = "") -> Constraint:
    """A number from `least` to `most`, both included."""
    return Constraint(lambda value: least <= value <= most, words or f"{least} to {most}")


def share(meaning: str = "0 to less than 1") -> Constraint:
    """A number from 0 to less than 1."""
    return Constraint(lambda value: 0 <= value < 1, meaning)


def one_of(choices: Collection[str], unset: bool = False) -> Constraint:
    """One of the given names or, with `unset`, the empty string."""
    return Constraint(lambda value: value in choices or (unset and value == ""), f"one of {', '.join(choices)}")


def some_of(choices: Collection[str]) -> Constraint:
    """One or more of the given names."""
    return Constraint(lambda values: bool(values) and set(values) <= set(choices), f"some of {', '.join(choices)}")


def optional(constraint: Constraint) -> Constraint:
    """None, or a value that `constraint` accepts."""
    return Constraint(lambda value: value is None or constraint.holds(value), constraint.expected)


def text(what: str) -> Constraint:
    """A string that is not blank."""
    return Constraint(lambda value: is_text(value) and bool(value.strip()), what)


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written to a file: without NUL, and in whole characters."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON and the command line can hold
        return False


def several_texts(what: str) -> Constraint:
    """A non-empty tuple of strings that are not blank."""
    return Constraint(
        lambda values: bool(values) and isinstance(values, tuple) and all(is_plain(v) and v.strip() for v in values),
        f"at least one {what}",
    )


def is_plain(value: Any) -> bool:
    """Whether a value is text for a prompt: without control characters, and without what replaces broken ones."""
    return is_text(value) and not any(unicodedata.category(c) == "Cc" or c == "\ufffd" for c in value)


ANY_TEXT = Constraint(is_text, "a text")
YES_OR_NO = Constraint(lambda value: isinstance(value, bool), "True or False")


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields dotted key, field and value of every setting of a dataclass, including those of nested dataclasses."""
    for field in dataclasses.fields(settings):
        key, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{key}.")
        else:
            yield key, field, value


def check_settings(settings: Any, without: Collection[str] = ()) -> None:
    """Raises UserError for the first setting whose value breaks its constraint. Keys in `without` are skipped."""
    for key, value, expected in broken(settings):
        if key not in without:
            raise UserError(f"config.{key}={value!r}: expected {expected}")


def broken(settings: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields key, value and what was expected of every setting whose value breaks its constraint."""
    for key, field, value in flatten(settings):
        constraint = field.metadata["constraint"]
        if not follows(constraint, value):
            yield key, value, constraint.expected


def follows(constraint: Constraint, value: Any) -> bool:
    """Whether the constraint accepts a value, which may have any type."""
    try:
        return bool(constraint.holds(value))
    except (TypeError, AttributeError):  # the predicate does not apply to a value of this type
        return False


def part_of(settings: Any, kind: type[SettingsT]) -> SettingsT:
    """Returns the settings that a dataclass inherits from `kind`, alone."""
    return kind(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)})


def replaced(settings: SettingsT, changes: dict[str, Any]) -> SettingsT:
    """Returns the settings with new values for some dotted keys. Raises KeyError for an unknown key."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, dot, rest = key.partition(".")
        if name not in {field.name for field in dataclasses.fields(settings)}:
            raise KeyError(key)
        if dot:
            inner.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, part in inner.items():
        try:
            own[name] = replaced(getattr(settings, name), part)
        except KeyError as error:
            raise KeyError(f"{name}.{error.args[0]}") from error
    return dataclasses.replace(settings, **own)
