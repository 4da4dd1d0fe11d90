"""Concept sets for evaluation: one folder per concept, with `concept.json`, `train/`, `heldout/` and their masks."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from catversion_jax.data.prompts import article, fill
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import MIB, open_regular
from catversion_jax.utils.paths import AnyPath, expand, files_below
from catversion_jax.utils.records import read_record

SHIPPED = Path(__file__).parents[1] / "concepts"
KEYS = ("class_word", "article")
EXAMPLE = '{"class_word": "teapot", "article": "a"}'


@dataclass(frozen=True)
class ConceptFolder:
    """One concept: photos to train on, held-out photos to evaluate with, and what it is called."""

    path: AnyPath

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def train(self) -> AnyPath:
        return self.path / "train"

    @property
    def train_masks(self) -> AnyPath:
        return self.path / "train_masks"

    @property
    def heldout(self) -> AnyPath:
        return self.path / "heldout"

    @property
    def heldout_masks(self) -> AnyPath:
        return self.path / "heldout_masks"

    @cached_property
    def description(self) -> dict[str, str]:
        """Class word and article. Raises UserError if `concept.json` does not hold exactly these two."""
        path = self.path / "concept.json"
        expected = f"expected the texts {' and '.join(KEYS)}, as {EXAMPLE}"
        concept = read_record(path, dict[str, str], expected)
        if set(concept) != set(KEYS) or not concept["class_word"].strip():
            raise UserError(f"{path}: {concept}; {expected}")
        return concept

    @cached_property
    def digest(self) -> str:
        """Hashes the names and contents of all its files, to 16 hexadecimal digits."""
        hashed = hashlib.sha256()
        for path in files_below(self.path):
            contents = hashlib.sha256()
            with open_regular(path) as file:
                for block in iter(partial(file.read, MIB), b""):
                    contents.update(block)
            name = os.path.relpath(os.fspath(path), os.fspath(self.path))
            hashed.update(os.fsencode(name) + b"\0" + contents.digest())
        return hashed.hexdigest()[:16]

    @property
    def class_word(self) -> str:
        return self.description["class_word"]

    @property
    def article(self) -> str:
        return self.description["article"]

    def prompts(self, templates: Sequence[str]) -> tuple[str, ...]:
        """The templates, filled in for this concept."""
        return tuple(
            fill(template, self.class_word, self.article or article(self.class_word)) for template in templates
        )

    def changes(self) -> dict[str, str]:
        """The config's values, by dotted key, to train on this concept."""
        return {"data.dir": str(self.train)} | {f"concept.{key}": value for key, value in self.description.items()}


def find_concepts(root: str | AnyPath) -> list[ConceptFolder]:
    """The concepts of a set, sorted by name. Raises UserError if there are none."""
    paths = sorted(path.parent for path in expand(root).glob("*/concept.json"))
    if not paths:
        raise UserError(f"{root}: no concepts; expected folders with concept.json, train/, heldout/ and their masks")
    return list(map(ConceptFolder, paths))
