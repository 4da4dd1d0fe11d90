"""A run's identity: what the results in a folder are of. The same command goes on there; another is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically


def refuse_another(path: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Raises UserError if the file says that its folder belongs to another run. Keys that it lacks are as in
    `defaults`."""
    if not path.is_file():
        return
    try:
        old = dict(defaults or {}) | json.loads(path.read_text())
    except (ValueError, TypeError):
        raise UserError(f"{path}: not the JSON of a run's config; choose another folder") from None
    new = json.loads(json.dumps(identity))
    differences = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differences:
        listed = "; ".join(differences)
        raise UserError(f"{path.parent}: belongs to another config ({listed}); give the same one, or another folder")


def claim(path: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Writes the identity of a folder's run, JSON, and makes the folder. Raises UserError if it is another run's."""
    refuse_another(path, identity, defaults)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_atomically(path, lambda file: file.write_text(json.dumps(identity, indent=1) + "\n"))
