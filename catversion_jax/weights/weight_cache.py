"""Caches a base model's converted weights with Orbax, so that the next start does not convert them again."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from catversion_jax.utils import cache, tree
from catversion_jax.utils.errors import short
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.types import Params
from catversion_jax.weights.source import Source

SMALLEST = 2**28
"""The least bytes of weight files for which a copy is kept: smaller ones are converted in a second."""
# A copy pays only if it is much smaller than the files: float32 files of a bfloat16 model, or a `.ckpt` that also holds
# averaged weights. Otherwise reading it takes as long as converting: for Stable Diffusion 1.5 in float16 files, a copy
# was read in 13.6 s (float32) or 10.7 s (bfloat16), and the files were converted in about 10 s (docs/performance.md).
WORTH = 1.5
"""The least ratio of the files' bytes to the arrays' bytes for which a copy is kept."""
VERSION = 1  # of the copies' format; copies of another version are not found
FACTS = "facts.json"  # written last: a copy without it is incomplete

Converted = tuple[dict[str, Params], str]
"""The parameters of each component, and the text encoders' fingerprint."""


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
        facts = json.loads((folder / FACTS).read_text())
        expected = {name: shapes(name) for name in dtypes}
        with checkpointer(expected) as copy:
            params = copy.restore(folder.absolute() / "params", args=orbax().args.StandardRestore(expected))
        if digest_of_texts(params) == facts["digest"]:
            return params, facts["fingerprint"]
        problem = "its text encoder is not the one that was kept"
    except Exception as error:  # a storage library may raise anything for a damaged folder
        problem = short(error)
    warn(f"{folder}: the converted copy is damaged ({problem}); converting again")
    shutil.rmtree(folder, ignore_errors=True)
    return None


def keep(folder: Path, params: dict[str, Params], fingerprint: str) -> None:
    """Stores a copy. A failure is only warned of: the next start converts again."""
    facts = {"fingerprint": fingerprint, "digest": digest_of_texts(params)}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with checkpointer(params) as copy:
            copy.save(folder.absolute() / "params", args=orbax().args.StandardSave(params))
        write_atomically(folder / FACTS, lambda path: path.write_text(json.dumps(facts)))
    except Exception as error:  # most likely a full disk
        warn(f"{folder}: no converted copy kept ({short(error)})")
        shutil.rmtree(folder, ignore_errors=True)


def digest_of_texts(params: dict[str, Params]) -> str:
    """Hashes the text encoders' values as they are kept."""
    texts = {name: of_component for name, of_component in params.items() if name.startswith("text")}
    return tree.fingerprint(
        {path: tree.digest(np.asarray(leaf)) for path, leaf in flatten_dict(texts, sep="/").items()}
    )
