"""Trains a setting's concepts, side by side in one compiled step if the method lets them share it."""

import json
import time
from collections.abc import Sequence

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.registry import METHODS
from catversion_jax.study.settings import TRIED_ON
from catversion_jax.training.many_concepts import train_many
from catversion_jax.training.run import train_once
from catversion_jax.training.share import Share
from catversion_jax.utils.errors import Interrupted, UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath, make_folder
from catversion_jax.utils.records import read_record
from catversion_jax.utils.settings import check_settings

SECONDS = "seconds.json"
SLOTS = len(TRIED_ON)
"""Number of concepts trained side by side."""


def train_setting(
    config: Config, folders: Sequence[ConceptFolder], out: AnyPath, pipeline: BasePipeline
) -> tuple[dict[str, Concept], float | None]:
    """Returns the concept of each folder, by its name, and the seconds per concept.

    Existing concepts are not trained again. The seconds include compilation and are those of the first call for `out`;
    None if that was interrupted.
    """
    whole = not out.exists()
    start = time.monotonic()
    (separately if METHODS[config.method].changes_unet else side_by_side)(config, folders, out, pipeline)
    if whole:
        seconds = (time.monotonic() - start) / len(folders)
        write_atomically(out / SECONDS, lambda path: path.write_text(json.dumps(seconds)))
    path = out / SECONDS
    taken = read_record(path, float, "expected a number; remove it") if path.is_file() else None
    return {folder.name: concept_file.load(out / folder.name) for folder in folders}, taken


def side_by_side(config: Config, folders: Sequence[ConceptFolder], out: AnyPath, pipeline: BasePipeline) -> None:
    lines = [
        {"id": folder.name, "dir": str(folder.train), "masks": str(folder.train_masks), **folder.description}
        for folder in folders
    ]
    make_folder(out)
    manifest = out / "manifest.jsonl"
    write_atomically(manifest, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in lines)))
    config = config.replaced({"run_dir": str(out), "batch.slots": SLOTS})
    outcome = train_many(Share.of(config, manifest), pipeline)
    if outcome.interrupted_by:
        raise Interrupted(outcome.interrupted_by)
    if outcome.failed:
        raise UserError(f"{out}: a concept was not learned; catversion status {out} says why")


def separately(config: Config, folders: Sequence[ConceptFolder], out: AnyPath, pipeline: BasePipeline) -> None:
    for folder in folders:
        with_masks = config.replaced({"data.masks_dir": str(folder.train_masks)})
        train_alone(with_masks, folder, out, pipeline)


def train_alone(config: Config, folder: ConceptFolder, out: AnyPath, pipeline: BasePipeline) -> Concept:
    """Trains a concept in a run of its own in `out`, unless it exists; returns it."""
    config = config.replaced(folder.changes() | {"run_dir": str(out / folder.name)})
    check_settings(config)
    return train_once(config, pipeline)
