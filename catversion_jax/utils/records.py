"""Records: what is read back from JSON files, declared as dataclasses, and checked by msgspec when it is read.

A record's annotations are its schema: `int | None`, `tuple[str, ...]`, `Annotated[int, Meta(ge=0)]`. Keys that it does
not declare are ignored, unless it is a `msgspec.Struct` with forbid_unknown_fields. JSON is UTF-8, with or without a
byte order mark, without NaN; a file that is too large or too deep is refused, not read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from catversion_jax.utils.errors import UserError, short
from catversion_jax.utils.files import BOM, MIB, open_own, open_regular, read_bytes
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, size_of

RecordT = TypeVar("RecordT")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A number of steps, or of other things, that is counted."""

MOST_BYTES = 16 * MIB
"""The largest JSON file: an index of shards, the largest that is common, takes a tenth."""
MOST_LINE_BYTES = MIB
"""The longest line of a JSON Lines file."""
MOST_GIVEN_BYTES = 2**16
"""The longest line of one that a user writes."""
MOST_LINES_BYTES = 1024 * MIB
"""The largest JSON Lines file: the metrics of ten million steps."""


def decode(data: bytes | str, kind: type[RecordT], where: str, expected: str) -> RecordT:
    """Parses JSON as a record of type `kind`. Raises UserError, naming `where`, for anything else."""
    try:
        return msgspec.json.decode(data.removeprefix(BOM) if isinstance(data, bytes) else data, type=kind)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise UserError(f"{where}: {short(error)}; {expected}") from None
    except msgspec.DecodeError as error:
        raise UserError(f"{where}: not JSON ({short(error)}); {expected}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; {expected}") from None


def convert(value: Any, kind: type[RecordT], where: str, expected: str) -> RecordT:
    """Checks JSON that was parsed already, as `decode` does."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {short(error)}; {expected}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; {expected}") from None


def encode(record: Any) -> str:
    """Returns a record as one line of JSON; NaN and infinity become null."""
    return msgspec.json.encode(record).decode()


def read_record(path: AnyPath, kind: type[RecordT], expected: str = "expected a JSON file") -> RecordT:
    """Reads a JSON file. Raises UserError if it is missing, too large, or not a record of type `kind`."""
    if not path.exists():
        raise UserError(f"{path}: not found; {expected}")
    return decode(read_bytes(path, MOST_BYTES, expected), kind, str(path), expected)


def read_lines(path: AnyPath, kind: type[RecordT]) -> Iterator[RecordT]:
    """Yields the records of a JSON Lines file, if it exists, holding one in memory at a time.

    Lines that are not such records are left out, with one warning: a crash cuts the last line of a file.
    """
    if not path.exists():
        return
    bad: list[int] = []
    reason = ""
    expected = "expected a JSON object a line"
    with open_regular(path, expected) as file:
        if size_of(path) > MOST_LINES_BYTES:
            raise UserError(f"{path}: larger than {MOST_LINES_BYTES // MIB} MiB; {expected}")
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), b""), 1):
            if line.strip():
                try:
                    yield decode(line, kind, f"line {number}", "expected another object")
                except UserError as error:
                    bad.append(number)
                    reason = reason or str(error)
    if bad:
        warn(f"{path}: {len(bad)} unreadable line{'s'[: len(bad) > 1]} left out, as after a crash ({reason})")


def given_lines(path: AnyPath) -> Iterator[tuple[str, bytes]]:
    """Yields the lines of a JSON Lines file of a user's that are not empty, each with the place that messages name."""
    with open_regular(path, "expected a file with a JSON object a line") as file:
        # A limit on each read: a file without line breaks, such as a photo given by mistake, may be large.
        for number, text in enumerate(iter(lambda: file.readline(MOST_GIVEN_BYTES), b""), 1):
            if text.strip():
                yield f"{path}:{number}", text


def append_line(path: Path, record: Any) -> None:
    """Appends a record to a JSON Lines file of ours, on a line of its own even if a crash cut the line before."""
    handle = open_own(path, os.O_RDWR | os.O_APPEND)
    with os.fdopen(handle, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        cut = False
        if size:
            file.seek(size - 1)
            cut = file.read(1) != b"\n"
        file.write((b"\n" if cut else b"") + encode(record).encode() + b"\n")
