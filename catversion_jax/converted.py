"""A base model's weights as our programs take them, kept with Orbax: the next start does not convert them again."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from catversion_jax import cache, tree
from catversion_jax.errors import short
from catversion_jax.files import write_atomically
from catversion_jax.source import Source
from catversion_jax.types import Params

SMALLEST = 2**28
"""Bytes of weights from which on a copy is kept: what is smaller is converted in a second."""
VERSION = 1  # of what a copy holds; another one's copies are not found
CONCURRENT_GB = 0.25  # that Orbax may hold at a time
FACTS = "facts.json"  # written last: a copy without it is not whole


def read(
    source: Source, shapes: dict[str, Params], convert: Callable[[], tuple[dict[str, Params], str]]
) -> tuple[dict[str, Params], str]:
    """The parameters of each component in `shapes` (with dtypes and shardings), and the text encoders' fingerprint:
    from the copy kept of these very files, or else by `convert`, of which a copy is then kept."""
    folder = place(source, shapes)
    if folder is None:
        return convert()
    found = restore(folder, shapes)
    if found is None:
        found = convert()
        keep(folder, *found)
    return found


def place(source: Source, shapes: dict[str, Params]) -> Path | None:
    """Where the copy lies, by the files' names, sizes and times; None for a small model."""
    files = sorted({tensor.path.resolve() for name in shapes for tensor in source.tensors(name).values()})
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if sum(size for _, size, _ in stats) < SMALLEST:
        return None
    leaves = [(path, leaf.shape, str(leaf.dtype)) for path, leaf in sorted(flatten_dict(shapes, sep="/").items())]
    key = hashlib.sha256(json.dumps([VERSION, stats, leaves]).encode()).hexdigest()[:16]
    return cache.home() / "models" / key


def checkpointer() -> ocp.Checkpointer:
    """One that is done when it returns, and holds little more than a few tensors meanwhile."""
    return ocp.Checkpointer(
        ocp.StandardCheckpointHandler(save_concurrent_gb=CONCURRENT_GB, restore_concurrent_gb=CONCURRENT_GB)
    )


def restore(folder: Path, shapes: dict[str, Params]) -> tuple[dict[str, Params], str] | None:
    """What a whole copy holds; a damaged one is removed."""
    if not (folder / FACTS).is_file():
        return None
    try:
        facts = json.loads((folder / FACTS).read_text())
        with checkpointer() as orbax:
            params = orbax.restore(folder.absolute() / "params", args=ocp.args.StandardRestore(shapes))
        if digest(params) == facts["digest"]:
            return params, facts["fingerprint"]
        problem = "its text encoder is not the one that was kept"
    except Exception as error:  # whatever a storage library finds in a damaged folder
        problem = short(error)
    logging.warning("%s: the converted copy is damaged (%s); converting again", folder, problem)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def keep(folder: Path, params: dict[str, Params], fingerprint: str) -> None:
    """Store a copy; where that fails, the next start converts again."""
    facts = {"fingerprint": fingerprint, "digest": digest(params)}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with checkpointer() as orbax:
            orbax.save(folder.absolute() / "params", args=ocp.args.StandardSave(params))
        write_atomically(folder / FACTS, lambda path: path.write_text(json.dumps(facts)))
    except Exception as error:  # a full disk, most of all
        logging.warning("%s: no converted copy kept (%s)", folder, short(error))
        shutil.rmtree(folder, ignore_errors=True)


def digest(params: dict[str, Params]) -> str:
    """Names the text encoders' values as they are kept."""
    texts = {name: of_component for name, of_component in params.items() if name.startswith("text")}
    return tree.fingerprint(
        {path: tree.digest(np.asarray(leaf)) for path, leaf in flatten_dict(texts, sep="/").items()}
    )
