"""What the results in a folder are of: the same command goes on there, another one is refused."""

import json
from pathlib import Path
from typing import Any

from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically


def claim(path: Path, what: dict[str, Any]) -> None:
    """Write `what`, of JSON's types, to a file and make its folder. Raises UserError where the file says otherwise."""
    text = json.dumps(what, indent=1) + "\n"
    if path.is_file() and path.read_text() != text:
        raise UserError(f"{path}: of another config or other concepts; give the same ones, or another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write_text(text))
