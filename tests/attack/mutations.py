"""Mutations of files: flipped bits and cuts for any of them, and for JSON other types, depths and encodings."""

import json
import random
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**70, -(2**70), 0.5, -0.0, 1e308, "", " ", "x", "x" * 5000, "\ud800",
    "a\0b", "\x1b[2J\n", "../../etc/passwd", "~nosuchuser/x", "/dev/zero", "NaN", [], {}, [[]], [None],
    [1, "a"], {"a": 1}, [0] * 5000,
)  # fmt: skip
"""Values that are put in place of others."""


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flips 1 to 8 bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_near_the_start(data: bytes, rng: random.Random) -> bytes:
    """Flips a bit of the first kilobyte, where headers are."""
    return flip(data[:1024], rng) + data[1024:]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 7, len(data) // 2, len(data) - 1, rng.randrange(len(data) + 1)))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 8, 300))) + data[at:]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    value = rng.choice((b"\0", b"\xff", b"[", b'"', b"{", b"9"))
    return data[:at] + value * rng.choice((1, 8, 300)) + data[at + 8 :]


def twice(data: bytes, rng: random.Random) -> bytes:
    return data + data


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def noise(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 100, 10_000)))


BINARY: tuple[Mutation, ...] = (flip, flip, flip_near_the_start, cut, cut, insert, overwrite, twice, empty, noise)


def bom(data: bytes, rng: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + data


def other_encoding(data: bytes, rng: random.Random) -> bytes:
    text = data.decode(errors="replace") + " é"
    return text.encode(rng.choice(("utf-16", "utf-32", "latin-1")), errors="replace")


def deep(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice((100, 100_000))
    return b"[" * depth + data + b"]" * depth


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Returns the paths of all values in JSON."""
    if isinstance(value, dict):
        inner = [place for key in value for place in places(value[key], (*path, key))]
    elif isinstance(value, list):
        inner = [place for index in range(min(len(value), 50)) for place in places(value[index], (*path, index))]
    else:
        inner = []
    return [path, *inner]


def replaced_at(value: Any, path: tuple, change: Callable[[Any, Any], None], new: Any) -> Any:
    """Applies `change` to the container and the key at `path`; a path without a key replaces the whole."""
    if not path:
        return new
    container = value
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return value


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Replaces, removes or renames one value; data that is not JSON is flipped."""
    try:
        value = json.loads(data)
    except ValueError:
        return flip(data, rng)
    path, new = rng.choice(places(value)), rng.choice(VALUES)

    def put(container, key):
        container[key] = new

    def remove(container, key):
        del container[key]

    def rename(container, key):
        if isinstance(container, dict):
            container[rng.choice(("", "x", "\x1b[0m", f"{key} "))] = container.pop(key)

    changed = replaced_at(value, path, rng.choice((put, put, put, remove, rename)), new)
    text = json.dumps(changed).encode()
    # NaN and infinity, which Python writes and JSON lacks.
    return text.replace(b"0.5", rng.choice((b"NaN", b"Infinity", b"1e999", b"0.5")), 1)


TEXT: tuple[Mutation, ...] = (change_json,) * 12 + (bom, other_encoding, deep, *BINARY)


def of_file(name: str) -> tuple[Mutation, ...]:
    """Returns the mutations that suit a file."""
    return TEXT if name.endswith((".json", ".jsonl", ".txt")) or "metadata" in name.lower() else BINARY


def change_line(data: bytes, rng: random.Random) -> bytes:
    """Changes one line of a JSON Lines file as JSON."""
    lines = data.splitlines(True) or [b""]
    index = rng.randrange(len(lines))
    lines[index] = rng.choice(TEXT)(lines[index].strip(), rng) + rng.choice((b"\n", b"\n", b""))
    return b"".join(lines)
