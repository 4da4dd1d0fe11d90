"""A setting's concepts, learned: side by side in one compiled step where the method lets them share it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from catversion_jax import artifact, batch
from catversion_jax.artifact import Concept
from catversion_jax.concept_folders import described
from catversion_jax.distributed import Process
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.methods import METHODS
from catversion_jax.pipeline import Pipeline
from catversion_jax.study.settings import TRIED_ON
from catversion_jax.train import learn_once

SECONDS = "seconds.json"
SLOTS = len(TRIED_ON)
"""Concepts side by side."""


def learn(
    config: ConfigDict, folders: Sequence[Path], out: Path, pipeline: Pipeline
) -> tuple[dict[str, Concept], float | None]:
    """The concept of each folder, by its name, and the seconds a concept took, compilation included, the first time
    that any were learned in `out`; None where that was interrupted. What is there already is not learned again."""
    whole = not out.exists()
    start = time.monotonic()
    (separately if METHODS[config.method].changes_unet else side_by_side)(config, folders, out, pipeline)
    if whole:
        seconds = (time.monotonic() - start) / len(folders)
        write_atomically(out / SECONDS, lambda path: path.write_text(json.dumps(seconds)))
    taken = json.loads((out / SECONDS).read_text()) if (out / SECONDS).is_file() else None
    return {folder.name: artifact.load(out / folder.name) for folder in folders}, taken


def side_by_side(config: ConfigDict, folders: Sequence[Path], out: Path, pipeline: Pipeline) -> None:
    config = config.copy_and_resolve_references()
    config.run_dir, config.batch.slots = str(out), SLOTS
    lines = [
        {"id": folder.name, "dir": str(folder / "train"), "masks": str(folder / "train_masks"), **described(folder)}
        for folder in folders
    ]
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.jsonl"
    write_atomically(manifest, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in lines)))
    status = batch.run(config, manifest, Process(), pipeline)
    if status > batch.FAILED:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"{out}: a concept was not learned; its report.jsonl says why")


def separately(config: ConfigDict, folders: Sequence[Path], out: Path, pipeline: Pipeline) -> None:
    for folder in folders:
        config = config.copy_and_resolve_references()
        config.run_dir, config.data.dir = str(out / folder.name), str(folder / "train")
        config.data.masks_dir = str(folder / "train_masks")
        config.concept.update(described(folder))
        learn_once(config, pipeline)
