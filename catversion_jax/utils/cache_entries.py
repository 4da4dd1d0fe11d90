"""The integrity of XLA's compilation cache: a digest of every entry, checked before JAX reads any of them.

JAX loads an entry as it is, and writes none that exists: one that a full disk has cut would be compiled anew at every
start, and a flipped bit can crash the process. What fails the check is deleted here, so that JAX writes it again.
"""

import contextlib
import hashlib
import importlib
import zlib
from pathlib import Path

from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically

SEALS = "catversion_digests.json"


def check(folder: Path) -> int:
    """Deletes the damaged entries of a cache and records the digests of the others; returns how many were deleted.

    An entry without a digest, of a process that is running or was killed, is whole if it can be decompressed.
    """
    seals: dict[str, str] = {}
    with contextlib.suppress(UserError, OSError):
        seals = records.read_record(folder / SEALS, dict[str, str])
    found: dict[str, str] = {}
    damaged = 0
    for path in sorted(folder.glob("*-cache")):
        with contextlib.suppress(OSError):  # another process may delete it, too
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if seals.get(path.name, digest) == digest and (path.name in seals or is_whole(data)):
                found[path.name] = digest
            else:
                damaged += 1
                path.unlink()
    if found != seals:
        with contextlib.suppress(OSError):  # the next start checks again
            write_atomically(folder / SEALS, lambda file: file.write_text(records.encode(found)))
    return damaged


def is_whole(data: bytes) -> bool:
    """Whether an entry can be decompressed; JAX compresses with zstandard where Python has it, else with zlib."""
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            zstd = importlib.import_module(name)
            break
    else:
        zstd = None
    try:
        zstd.decompress(data) if zstd else zlib.decompress(data)
    except Exception:  # each library has its own errors
        return False
    return True
