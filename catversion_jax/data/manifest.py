"""The manifest of concepts that `catversion batch` trains: one JSON object per line."""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import expand

MAX_LINE_BYTES = 2**16
IDS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
RESERVED = ("checkpoints", "config.json", "report.jsonl")
"""Names that the results folder uses for other things."""


@dataclass(frozen=True)
class Line:
    """One concept to train. Values that are not given come from the config."""

    id: str  # the name of its results folder
    dir: str  # its photos; a relative path starts at the manifest's folder
    class_word: str
    masks: str = ""  # as data.masks_dir; a relative path as for dir
    article: str = ""
    seed: int | None = None
    steps: int | None = None  # also the length of its learning rate schedule

    def changes(self, folder: Path) -> dict[str, Any]:
        """The config's values, by dotted key, that the line gives; `folder` is the manifest's."""
        changes = {
            "data.dir": str(folder / expand(self.dir)),
            "data.masks_dir": self.masks and str(folder / expand(self.masks)),
            "concept.class_word": self.class_word,
        }
        given = {"concept.article": self.article or None, "seed": self.seed, "train.steps": self.steps}
        return changes | {key: value for key, value in given.items() if value is not None}


TYPES = {"id": str, "dir": str, "class_word": str, "masks": str, "article": str, "seed": int, "steps": int}
REQUIRED = {field.name for field in fields(Line) if field.default is MISSING}
RULES = {
    "id": (lambda value: IDS.fullmatch(value) and value not in RESERVED, "a name for a folder, of A-Z a-z 0-9 _ . -"),
    "dir": (bool, "a folder of photos"),
    "class_word": (lambda value: bool(value.strip()), "the base class, such as teapot"),
    "seed": (lambda value: 0 <= value < 2**32, "0 to 2^32 - 1"),
    "steps": (lambda value: value >= 1, "at least 1"),
}
"""key -> a predicate for its value, and a phrase that follows "expected"."""


def read_manifest(path: Path) -> Iterator[Line]:
    """Yields the lines of a manifest, holding one in memory at a time.

    Raises UserError, naming the line, if a line is not valid or repeats an id.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file with a JSON object a line") from error
    seen: dict[str, int] = {}
    with file:
        # A limit on each read: a file without line breaks, such as a photo given by mistake, may be large.
        for number, text in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not text.strip():
                continue
            line = parse_line(text, f"{path}:{number}")
            if line.id in seen:
                raise UserError(
                    f"{path}:{number}: id {line.id!r} is also that of line {seen[line.id]}; give it another"
                )
            seen[line.id] = number
            yield line
    if not seen:
        raise UserError(f"{path}: no lines; expected a JSON object a line, with {', '.join(sorted(REQUIRED))}")


def parse_line(text: bytes, where: str) -> Line:
    """Parses one line of a manifest; `where` names it in error messages."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); expected an object of at most {MAX_LINE_BYTES} bytes") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with {', '.join(sorted(REQUIRED))}")
    value = {key: entry for key, entry in value.items() if entry is not None or key in REQUIRED}
    if missing := sorted(REQUIRED - value.keys()):
        raise UserError(f"{where}: no {', no '.join(missing)}; expected id, dir and class_word")
    if unknown := sorted(value.keys() - TYPES.keys()):
        raise UserError(f"{where}: {unknown[0]!r:.80} is no key; expected {', '.join(TYPES)}")
    for key, entry in value.items():
        holds, expected = RULES.get(key, (lambda _: True, "text"))
        if type(entry) is not TYPES[key] or not holds(entry):
            raise UserError(f"{where}: {key}={entry!r:.80}; expected {expected}")
    return Line(**value)
