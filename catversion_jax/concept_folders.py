"""Folders of concepts to measure with: `concept.json` (class_word, article), `train/`, `heldout/` and their masks."""

from pathlib import Path

from catversion_jax.config import expand
from catversion_jax.errors import UserError
from catversion_jax.source import read_json

SHIPPED = Path(__file__).parent / "concepts"
KEYS = ("class_word", "article")


def find(root: str) -> list[Path]:
    """The concepts' folders by name. Raises UserError where there is none."""
    folders = sorted(path.parent for path in expand(root).glob("*/concept.json"))
    if not folders:
        raise UserError(f"{root}: no concepts; expected folders with concept.json, train/, heldout/ and their masks")
    return folders


def described(folder: Path) -> dict[str, str]:
    """A concept's class word and article. Raises UserError where the file has not both, or more."""
    path = folder / "concept.json"
    concept = read_json(path)
    if not isinstance(concept, dict) or {k: type(v) for k, v in concept.items()} != dict.fromkeys(KEYS, str):
        raise UserError(
            f'{path}: {concept}; expected the texts {" and ".join(KEYS)}, as {{"class_word": "teapot", "article": "a"}}'
        )
    return concept
