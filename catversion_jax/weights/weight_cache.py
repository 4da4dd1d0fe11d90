"""A base model's weights as our programs take them, kept with Orbax: the next start does not convert them again."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from catversion_jax.utils import cache, tree
from catversion_jax.utils.errors import short
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.types import Params
from catversion_jax.weights.source import Source

SMALLEST = 2**28
"""Bytes of files from which on a copy is kept: what is smaller is converted in a second."""
WORTH = 1.5
"""Bytes of files for each byte of arrays, at least: float32 files of a bfloat16 model, or a `.ckpt` that has averaged
weights besides. What is not larger is converted as fast as a copy is read (docs/performance.md)."""
VERSION = 1  # of what a copy holds; another one's copies are not found
FACTS = "facts.json"  # written last: a copy without it is not whole

Converted = tuple[dict[str, Params], str]
"""The parameters of each component and the text encoders' fingerprint."""


def read(
    source: Source, dtypes: dict[str, Any], shapes: Callable[[str], Params], convert: Callable[[], Converted]
) -> Converted:
    """The parameters of each component in `dtypes`, and the text encoders' fingerprint: from the copy kept of these
    very files, laid out as `shapes` (of a component: dtypes and shardings), or else by `convert`, of which a copy is
    then kept."""
    folder = copy_folder(source, dtypes)
    if folder is None:
        return convert()
    found = restore(folder, dtypes, shapes)
    if found is None:
        found = convert()
        keep(folder, *found)
    return found


def copy_folder(source: Source, dtypes: dict[str, Any]) -> Path | None:
    """Where the copy lies, by the files' names, sizes and times, and the configs; None where it would not pay."""
    tensors = [(tensor, dtype) for name, dtype in dtypes.items() for tensor in source.tensors(name).values()]
    files = sorted({tensor.path.resolve() for tensor, _ in tensors})
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    size = sum(size for _, size, _ in stats)
    if size < SMALLEST or size < WORTH * sum(math.prod(t.shape) * np.dtype(dtype).itemsize for t, dtype in tensors):
        return None
    components = [(name, str(np.dtype(dtype)), source.config(name)) for name, dtype in dtypes.items()]
    key = hashlib.sha256(json.dumps([VERSION, stats, components], sort_keys=True).encode()).hexdigest()[:16]
    return cache.home() / "models" / key


def checkpointer(shapes: Any) -> ocp.Checkpointer:
    """One that is done when it returns, and holds little more than the largest array meanwhile."""
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / 1e9 + 1e-3
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(save_concurrent_gb=largest, restore_concurrent_gb=largest))


def restore(folder: Path, dtypes: dict[str, Any], shapes: Callable[[str], Params]) -> Converted | None:
    """What a whole copy holds; a damaged one is removed."""
    if not (folder / FACTS).is_file():
        return None
    try:
        facts = json.loads((folder / FACTS).read_text())
        expected = {name: shapes(name) for name in dtypes}
        with checkpointer(expected) as orbax:
            params = orbax.restore(folder.absolute() / "params", args=ocp.args.StandardRestore(expected))
        if digest(params) == facts["digest"]:
            return params, facts["fingerprint"]
        problem = "its text encoder is not the one that was kept"
    except Exception as error:  # whatever a storage library finds in a damaged folder
        problem = short(error)
    warn(f"{folder}: the converted copy is damaged ({problem}); converting again")
    shutil.rmtree(folder, ignore_errors=True)
    return None


def keep(folder: Path, params: dict[str, Params], fingerprint: str) -> None:
    """Store a copy; where that fails, the next start converts again."""
    facts = {"fingerprint": fingerprint, "digest": digest(params)}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with checkpointer(params) as orbax:
            orbax.save(folder.absolute() / "params", args=ocp.args.StandardSave(params))
        write_atomically(folder / FACTS, lambda path: path.write_text(json.dumps(facts)))
    except Exception as error:  # a full disk, most of all
        warn(f"{folder}: no converted copy kept ({short(error)})")
        shutil.rmtree(folder, ignore_errors=True)


def digest(params: dict[str, Params]) -> str:
    """Names the text encoders' values as they are kept."""
    texts = {name: of_component for name, of_component in params.items() if name.startswith("text")}
    return tree.fingerprint(
        {path: tree.digest(np.asarray(leaf)) for path, leaf in flatten_dict(texts, sep="/").items()}
    )
