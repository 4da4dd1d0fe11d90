"""The manifest of concepts that `catversion batch` trains: one JSON object per line."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from catversion_jax.data.photo_sources import SECURE
from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.id_set import IdSet
from catversion_jax.utils.paths import SCHEME, AnyPath, is_remote, named_in

RESERVED = ("checkpoints", "config.json", "report.jsonl")
"""Names that the results folder uses for other things."""

FolderName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")]
Words = Annotated[str, Meta(pattern=r"\S")]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
Steps = Annotated[int, Meta(ge=1, lt=2**31)]
EXPECTED = (
    "expected an object with id (a folder's name, of A-Z a-z 0-9 _ . -), dir and class_word; optionally masks, "
    "article, seed (0 to 2^32 - 1) and steps (at least 1)"
)


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One concept to train. Values that are not given, or null, come from the config."""

    id: FolderName  # the name of its results folder
    dir: Words  # its photos; a relative path starts at the manifest's folder
    class_word: Words
    masks: str | None = None  # as data.masks_dir; a relative path as for dir
    article: str | None = None
    seed: Seed | None = None
    steps: Steps | None = None  # also the length of its learning rate schedule

    def changes(self, folder: AnyPath) -> dict[str, Any]:
        """The config's values, by dotted key, that the line gives; `folder` is the manifest's."""
        changes = {
            "data.dir": self.dir if self.dir.startswith(SECURE) else str(named_in(folder, self.dir)),
            "data.masks_dir": str(named_in(folder, self.masks)) if self.masks else "",
            "concept.class_word": self.class_word,
        }
        given = {"concept.article": self.article or None, "seed": self.seed, "train.steps": self.steps}
        return changes | {key: value for key, value in given.items() if value is not None}

    def resolved(self, folder: AnyPath, seed: int, steps: int) -> "Line":
        """Returns the line with the config's `seed` and `steps` if it has none, and with its paths in one spelling."""
        masks = self.masks and same_spelling(self.masks, folder)
        seed, steps = (own if own is not None else other for own, other in ((self.seed, seed), (self.steps, steps)))
        return msgspec.structs.replace(
            self,
            dir=same_spelling(self.dir, folder),
            masks=masks or None,
            article=self.article or None,
            seed=seed,
            steps=steps,
        )

    @property
    def digest(self) -> str:
        """A hash of the values that a concept is learned with: of all but the id."""
        values = msgspec.structs.replace(self, id="")
        return hashlib.sha256(records.encode(values).encode()).hexdigest()[:16]


def same_spelling(path: str, folder: AnyPath) -> str:
    """Returns a path without . and a slash at its end, and relative if it is in the manifest's folder."""
    if SCHEME.match(path) or is_remote(folder):
        whole, own = path.rstrip("/").removeprefix("./"), os.fspath(folder).rstrip("/")
        return whole.removeprefix(f"{own}/")
    whole = os.path.normpath(path)
    own = os.path.abspath(folder)
    return os.path.relpath(whole, own) if whole.startswith(f"{own}{os.sep}") else whole


def read_manifest(path: AnyPath) -> Iterator[Line]:
    """Yields the lines of a manifest, holding one in memory at a time, and 24 to 48 bytes for each before it.

    Raises UserError, naming the line, if a line is not valid or repeats an id.
    """
    seen = IdSet()
    for where, text in records.given_lines(path):
        line = parse_line(text, where)
        if not seen.add(line.id):
            first = next(found for found, text in records.given_lines(path) if parse_line(text, found).id == line.id)
            number = first.rpartition(":")[2]
            raise UserError(f"{where}: id {line.id!r} is also that of line {number}; give it another")
        yield line
    if not seen:
        raise UserError(f"{path}: no lines; {EXPECTED}")


def parse_line(text: bytes, where: str) -> Line:
    """Parses one line of a manifest; `where` names it in error messages."""
    line = records.decode(whole_characters(text), Line, where, EXPECTED)
    if line.id in RESERVED:
        raise UserError(f"{where}: id {line.id!r} is the name of one of the batch's own files; give it another")
    return line


def whole_characters(text: bytes) -> bytes:
    """Replaces escaped halves of characters, which JSON may hold and no file name, by U+FFFD.

    The concept with such a value then fails by itself, and the others of the manifest are trained.
    """
    if b"\\ud" not in text.lower():
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # said by `records.decode`
        return text
    return re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(value, ensure_ascii=False)).encode()
