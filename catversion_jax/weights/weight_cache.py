"""Caches a base model's converted weights with Orbax, so that the next start does not convert them again."""

import contextlib
import errno
import hashlib
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from catversion_jax.utils import cache
from catversion_jax.utils.errors import UserError, listed, short
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.records import encode, read_record
from catversion_jax.utils.types import Params
from catversion_jax.weights.conversion import THREADS
from catversion_jax.weights.source import Source

SMALLEST = 2**28
"""The least bytes of weight files for which a copy is kept: smaller ones are converted in a second."""
# A copy pays only if it is much smaller than the files: float32 files of a bfloat16 model, or a `.ckpt` that also holds
# averaged weights. Otherwise reading it takes as long as converting: for Stable Diffusion 1.5 in float16 files, a copy
# was read in 13.6 s (float32) or 10.7 s (bfloat16), and the files were converted in about 10 s (docs/performance.md).
WORTH = 1.5
"""The least ratio of the files' bytes to the arrays' bytes for which a copy is kept."""
VERSION = 2  # of the copies' format; copies of another version are not found
FACTS = "facts.json"  # written last: a copy without it is incomplete

PARAMS = "params"  # the folder beside it that Orbax writes
ABANDONED = 24 * 60 * 60
"""Seconds after which an unfinished copy is removed."""

Converted = tuple[dict[str, Params], str]
"""The parameters of each component, and the text encoders' fingerprint."""


@dataclass(frozen=True)
class CopyFacts:
    """What is known of a copy."""

    fingerprint: str  # of the text encoders, as the model's files have them
    files: dict[str, str]  # the digest of each
    digest: str = ""  # of the other two fields

    def digest_of_rest(self) -> str:
        rest = json.dumps([self.fingerprint, self.files], sort_keys=True)
        return hashlib.sha256(rest.encode()).hexdigest()


def read_or_convert(
    source: Source, dtypes: dict[str, Any], shapes: Callable[[str], Params], convert: Callable[[], Converted]
) -> Converted:
    """Returns the parameters of each component in `dtypes`, and the text encoders' fingerprint.

    They are read from the copy of these files, with the dtypes and shardings of `shapes` (component -> tree), if there
    is one; otherwise `convert` makes them, and a copy is kept if that pays.
    """
    folder = copy_folder(source, dtypes)
    if folder is None:
        return convert()
    if reason := cache.make_private(folder.parent):
        warn(f"{folder.parent}: no converted copy kept: {reason}")
        return convert()
    found = restore(folder, dtypes, shapes)
    if found is None:
        found = convert()
        keep(folder, *found)
    return found


def copy_folder(source: Source, dtypes: dict[str, Any]) -> Path | None:
    """The copy's folder, named by the files' paths, sizes and times and the configs; None if a copy would not pay."""
    tensors = [(tensor, dtype) for name, dtype in dtypes.items() for tensor in source.tensors(name).values()]
    files = sorted({tensor.path.resolve() for tensor, _ in tensors})
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    size = sum(size for _, size, _ in stats)
    if size < SMALLEST or size < WORTH * sum(math.prod(t.shape) * np.dtype(dtype).itemsize for t, dtype in tensors):
        return None
    components = [(name, str(np.dtype(dtype)), source.config(name)) for name, dtype in dtypes.items()]
    key = hashlib.sha256(json.dumps([VERSION, stats, components], sort_keys=True).encode()).hexdigest()[:16]
    return cache.home() / "models" / key


def orbax() -> ModuleType:
    """Returns orbax.checkpoint, whose import takes a third of a second that commands without a copy do not need."""
    import orbax.checkpoint

    return orbax.checkpoint


def checkpointer(shapes: Any) -> Any:
    """A synchronous checkpointer that needs little more memory than the largest array."""
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / 1e9 + 1e-3
    ocp = orbax()
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(save_concurrent_gb=largest, restore_concurrent_gb=largest))


def restore(folder: Path, dtypes: dict[str, Any], shapes: Callable[[str], Params]) -> Converted | None:
    """Returns the contents of a complete copy, or None; removes a damaged one."""
    if not (folder / FACTS).is_file():
        return None
    try:
        facts = read_record(folder / FACTS, CopyFacts)
        if facts.digest != facts.digest_of_rest():
            raise UserError(f"{FACTS} is not what was kept")
        changed = facts.files.items() ^ digests_of_files(folder / PARAMS).items()
        if changed:
            raise UserError(f"not what was kept: {listed(sorted({name for name, _ in changed}))}")
        expected = {name: shapes(name) for name in dtypes}
        with checkpointer(expected) as copy:
            params = copy.restore(folder.absolute() / PARAMS, args=orbax().args.StandardRestore(expected))
        return params, facts.fingerprint
    except Exception as error:  # a storage library may raise anything for a damaged folder
        warn(f"{folder}: the converted copy is damaged ({short(error)}); converting again")
    remove(folder)
    return None


def keep(folder: Path, params: dict[str, Params], fingerprint: str) -> None:
    """Stores a copy, which another process sees complete or not at all. A failure is only warned of."""
    temporary = folder.parent / f".{folder.name}-{secrets.token_hex(8)}"
    try:
        for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        with checkpointer(params) as copy:
            copy.save(temporary.absolute() / PARAMS, args=orbax().args.StandardSave(params))
        facts = CopyFacts(fingerprint, digests_of_files(temporary / PARAMS))
        facts = replace(facts, digest=facts.digest_of_rest())
        write_atomically(temporary / FACTS, lambda path: path.write_text(encode(facts)))
        with contextlib.suppress(FileExistsError):  # a process that started with us was faster
            rename_new(temporary, folder)
    except Exception as error:  # most likely a full disk
        warn(f"{folder}: no converted copy kept ({short(error)})")
    shutil.rmtree(temporary, ignore_errors=True)


def rename_new(folder: Path, name: Path) -> None:
    """Renames a folder. Raises FileExistsError if there is another one of that name."""
    try:
        folder.rename(name)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(error.errno, error.strerror, str(name)) from error
        raise


def remove(folder: Path) -> None:
    """Removes a copy, under another name first, so that nobody finds half of it."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder.rename(folder.parent / f".{folder.name}-{secrets.token_hex(8)}"), ignore_errors=True)


def digests_of_files(folder: Path) -> dict[str, str]:
    """Hashes all files in a folder, by their names in it."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(THREADS) as pool:  # hashing releases the GIL
        return dict(zip(paths, pool.map(digest, paths.values()), strict=True))
