"""Folders of concepts to measure with: `concept.json` (class_word, article), `train/`, `heldout/` and their masks."""

from pathlib import Path

from catversion_jax.config import expand
from catversion_jax.errors import UserError
from catversion_jax.source import read_json

SHIPPED = Path(__file__).parent / "concepts"


def find(root: str) -> list[Path]:
    """The concepts' folders by name. Raises UserError where there is none."""
    folders = sorted(path.parent for path in expand(root).glob("*/concept.json"))
    if not folders:
        raise UserError(f"{root}: no concepts; expected folders with concept.json, train/ and heldout/")
    return folders


def described(folder: Path) -> dict[str, str]:
    """A concept's class word and article."""
    return read_json(folder / "concept.json")
