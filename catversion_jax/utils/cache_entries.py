"""The integrity of XLA's compilation cache: a digest of every entry, checked before JAX reads any of them.

JAX loads an entry as it is, and writes none that exists: one that a full disk has cut would be compiled anew at every
start, and a flipped bit can crash the process. What fails the check is deleted here, so that JAX writes it again.
"""

import contextlib
import hashlib
import importlib
import zlib
from collections.abc import Callable
from pathlib import Path

from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import read_bytes, refuse_link, write_atomically

SEALS = "catversion_digests.json"
MOST_BYTES = 2**31
ZLIB, ZSTANDARD = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), b"\x28\xb5\x2f\xfd"
"""The first bytes of an entry."""


def check(folder: Path) -> int:
    """Deletes the damaged entries of a cache and records the digests of the others; returns how many were deleted.

    An entry without a digest, of a process that is running or was killed, is whole if it can be decompressed, and stays
    as it is if that cannot be told here.
    """
    seals: dict[str, str] = {}
    with contextlib.suppress(UserError, OSError):
        seals = records.read_record(folder / SEALS, dict[str, str])
    found: dict[str, str] = {}
    damaged = 0
    for path in sorted(folder.glob("*-cache")):
        with contextlib.suppress(OSError, UserError):  # another process may delete it; what is no file is not ours
            data = read_bytes(path, MOST_BYTES, "expected a compiled program")
            digest = hashlib.sha256(data).hexdigest()
            whole = seals[path.name] == digest if path.name in seals else is_whole(data)
            if whole:
                found[path.name] = digest
            elif whole is False:
                damaged += 1
                path.unlink()
    if found != seals:
        with contextlib.suppress(OSError, UserError):  # the next start checks again
            refuse_link(folder / SEALS)
            write_atomically(folder / SEALS, lambda file: file.write_text(records.encode(found)))
    return damaged


def is_whole(data: bytes) -> bool | None:
    """Whether an entry can be decompressed: by zlib or, where Python has it, zstandard, with which JAX compresses.

    None: neither of its formats can be told from the first bytes, or zstandard is not here.
    """
    if data.startswith(ZSTANDARD):
        for name in ("compression.zstd", "zstandard"):
            with contextlib.suppress(ImportError):
                return decompresses(importlib.import_module(name).decompress, data)
        return None
    return decompresses(zlib.decompress, data) if data.startswith(ZLIB) or not data else None


def decompresses(decompress: Callable[[bytes], bytes], data: bytes) -> bool:
    try:
        decompress(data)
    except Exception:  # each library has its own errors
        return False
    return True
