"""A run's identity: the settings that made the results in a folder. The same command resumes; others are refused."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath, make_folder
from catversion_jax.utils.records import read_record


def differences(path: AnyPath, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> list[str]:
    """Returns how the identity in the file at `path` differs from this one, a phrase for each key.

    Keys that the file lacks have the values in `defaults`. Raises UserError if it is no file of this kind.
    """
    old = dict(defaults or {}) | read_record(path, dict[str, Any], "expected a run's config; choose another folder")
    # The old identity went through JSON, which turns tuples into lists.
    old, new = dict(flat_items(old)), dict(flat_items(json.loads(json.dumps(identity))))
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse_another(path: AnyPath, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Raises UserError if the file at `path` says that its folder belongs to another run; see `differences`."""
    if path.is_file() and (found := differences(path, identity, defaults)):
        what = f"belongs to another config ({listed(found, between='; ')})"
        raise UserError(f"{path.parent}: {what}; give the same one, or another folder")


def claim(path: AnyPath, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Creates a run's folder and writes its identity as JSON. Raises UserError if it belongs to another run."""
    refuse_another(path, identity, defaults)
    make_folder(path.parent)
    if not path.is_file():
        write_atomically(path, lambda file: file.write_text(json.dumps(identity, indent=1) + "\n"))


def flat_items(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings under dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
