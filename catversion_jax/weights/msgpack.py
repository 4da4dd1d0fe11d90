"""Reads files of flax.serialization.to_bytes: nested maps with arrays as leaves, in MessagePack.

The format: https://github.com/msgpack/msgpack/blob/master/spec.md. An array is an extension of type 1 that holds its
shape, the name of its dtype and its values. Only the bytes between the arrays' values are read; the values are read on
demand.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.weights.tensor import FileTensor

MAX_DEPTH = 32  # of nested maps, and of an array's axes
MAX_ENTRIES = 100_000
MAX_NAME_BYTES = 1024
MAX_PATH = 4096  # characters of an array's whole name; each array's is a text of its own
ARRAY, SCALAR = 1, 3  # flax's extension types; 2 is a complex number

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float64", "float32", "float16", "int64", "int32")}
DTYPES |= {"bfloat16": np.dtype(jnp.bfloat16), "uint8": np.dtype("u1"), "bool": np.dtype("?")}

SIZED = {
    **{0xC4 + n: ("bytes", 2**n) for n in range(3)},
    **{0xC7 + n: ("extension", 2**n) for n in range(3)},
    **{0xCC + n: ("integer", 2**n) for n in range(4)},
    **{0xD9 + n: ("text", 2**n) for n in range(3)},
    **{0xDC + n: ("array", 2 << n) for n in range(2)},
    **{0xDE + n: ("map", 2 << n) for n in range(2)},
}
"""first byte -> (kind, bytes of the big-endian length, or integer, that follows)."""

SMALL = [(0x80, "integer", 0x7F), (0x90, "map", 0x0F), (0xA0, "array", 0x0F), (0xC0, "text", 0x1F)]
"""(first byte below, kind, bits of that byte that are the length or integer)."""


class Head(NamedTuple):
    """The start of a value: its kind, and its length (for an integer, the integer itself)."""

    kind: str
    length: int


class Reader:
    """Reads a file's values in order. Raises ValueError for what flax would not have written."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def take(self, length: int) -> bytes:
        data = self.file.read(length)
        if len(data) < length:
            raise ValueError("it ends too early")
        return data

    def head(self) -> Head:
        first = self.take(1)[0]
        if first in SIZED:
            kind, width = SIZED[first]
            return Head(kind, int.from_bytes(self.take(width), "big"))
        if 0xD4 <= first <= 0xD8:
            return Head("extension", 1 << first - 0xD4)
        for end, kind, bits in SMALL:
            if first < end:
                return Head(kind, first & bits)
        raise ValueError(f"a value that begins with {first:#x}")

    def expect(self, kind: str) -> int:
        head = self.head()
        if head.kind != kind:
            raise ValueError(f"expected {kind}, found {head.kind}")
        return head.length

    def name(self) -> str:
        head = self.head()
        if head.kind not in ("text", "bytes") or head.length > MAX_NAME_BYTES:
            raise ValueError(f"a name that is {head.kind} of length {head.length}")
        return self.take(head.length).decode()

    def array(self, path: Path, length: int) -> FileTensor:
        """Reads an array's shape and dtype, and skips its values."""
        code, begin = self.take(1)[0], self.file.tell()
        if code not in (ARRAY, SCALAR) or self.expect("array") != 3:
            raise ValueError(f"an extension of type {code}")
        axes = self.expect("array")
        if axes > MAX_DEPTH:
            raise ValueError(f"an array of {axes} axes")
        shape = tuple(self.expect("integer") for _ in range(axes))
        dtype = self.name()
        if dtype not in DTYPES:
            raise ValueError(f"numbers of type {dtype!r}")
        size = self.expect("bytes")
        offset = self.file.tell()
        if size != math.prod(shape) * DTYPES[dtype].itemsize or offset + size != begin + length:
            raise ValueError(f"{size} bytes for an array of shape {shape} and type {dtype}")
        if offset + size > self.size:
            raise ValueError("it ends too early")
        self.file.seek(size, 1)
        return FileTensor(path, offset, shape, DTYPES[dtype])

    def leaves(self, path: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[str, FileTensor]]:
        head = self.head()
        if sum(map(len, above)) > MAX_PATH:
            raise ValueError(f"a name of more than {MAX_PATH} characters")
        if head.kind == "extension":
            yield "/".join(above), self.array(path, head.length)
            return
        if head.kind != "map" or len(above) > MAX_DEPTH or head.length > MAX_ENTRIES:
            raise ValueError(f"{head.kind} of length {head.length} at {'/'.join(above)!r}")
        for _ in range(head.length):
            name = self.name()
            if name == "__msgpack_chunked_array__":
                raise ValueError(f"{'/'.join(above)!r} is larger than 1 GiB, as no part of Stable Diffusion is")
            yield from self.leaves(path, (*above, name))


def open_msgpack(path: Path) -> dict[str, FileTensor]:
    """Returns the arrays by Flax path ("a/b/kernel"), unread. Raises UserError for what flax would not have written."""
    tensors: dict[str, FileTensor] = {}
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            for name, tensor in Reader(file, size).leaves(path):
                if name in tensors or len(tensors) > MAX_ENTRIES:
                    raise ValueError(f"{name!r} is there twice, or there are more than {MAX_ENTRIES:,} arrays")
                tensors[name] = tensor
            if file.tell() != size:
                raise ValueError("something follows its end")
    except ValueError as error:
        raise UserError(f"{path}: not a file of Flax parameters ({error}); copy or download it again") from error
    return tensors
