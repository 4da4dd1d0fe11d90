"""The concepts that a batch was training when it was interrupted, as its checkpoints hold them."""

import itertools
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from catversion_jax.training.checkpoints import NOTE, Saved, checkpoint_path, read_newest, saved_steps, unpacked
from catversion_jax.training.state import TrainState
from catversion_jax.training.step import StepConfig
from catversion_jax.utils.errors import UserError, short
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, NoAccess
from catversion_jax.utils.records import convert, read_record


class SlotNote(msgspec.Struct):
    """What is saved with the slots' states: the concept in each, None if it is empty, and its line's digest."""

    ids: list[str | None]
    digests: list[str | None] = []  # states that were saved before there were digests have none


class InterruptedConcept(NamedTuple):
    """An interrupted concept."""

    state: TrainState  # [1, ...]
    digest: str | None  # of its line


def note_of(concepts: Sequence[tuple[str, str | None] | None]) -> dict[str, Any]:
    """Returns the note to save with the states of slots: the id and the digest of the concept in each."""
    note = SlotNote([found and found[0] for found in concepts], [found and found[1] for found in concepts])
    return msgspec.to_builtins(note)


def read_interrupted(folders: Iterable[AnyPath], step_config: StepConfig) -> dict[str, InterruptedConcept]:
    """Returns the interrupted concepts by id, from the folders of checkpoints of all processes.

    What is damaged is left out with a warning: its concepts begin anew.
    """

    def shapes_of(note: dict[str, Any]) -> TrainState:
        count = len(to_slot_note(note).ids)
        shapes = jax.eval_shape(lambda: step_config.init_state([0] * count))
        return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)

    concepts: dict[str, InterruptedConcept] = {}
    for folder in folders:
        try:
            saved = read_newest(folder, shapes_of)
        except NoAccess:
            raise
        except UserError as error:
            warn(f"{error}; going on without it: its concepts begin anew")
            continue
        for concept_id, found in of_slots(saved) if saved else ():
            # After a restart with another number of processes, a concept may be in several folders.
            if concept_id not in concepts or found.state.step > concepts[concept_id].state.step:
                concepts[concept_id] = found
    return concepts


def noted_ids(folder: AnyPath) -> list[str]:
    """Returns the ids of the concepts that the newest readable checkpoint in a folder holds, none if there is none."""
    for step in saved_steps(folder):
        try:
            with unpacked(checkpoint_path(folder, step)) as local:
                note = read_record(local / NOTE, dict[str, Any], "expected a checkpoint's note")
            return [concept_id for concept_id in to_slot_note(note).ids if concept_id is not None]
        except NoAccess:
            raise
        # A newer one has replaced it meanwhile, or it is damaged: an older one has most of its concepts.
        except (FileNotFoundError, zipfile.BadZipFile, UserError) as error:
            warn(f"{folder / str(step)}: passed over ({short(error)})")
    return []


def to_slot_note(note: dict[str, Any]) -> SlotNote:
    return convert(note, SlotNote, "note", "expected the ids of the slots")


def of_slots(saved: Saved) -> Iterator[tuple[str, InterruptedConcept]]:
    """Yields the concepts of a checkpoint of slots, by id."""
    note = to_slot_note(saved.note)
    for index, (concept_id, digest) in enumerate(itertools.zip_longest(note.ids, note.digests)):
        if concept_id is not None:
            yield concept_id, InterruptedConcept(jax.tree.map(lambda x, i=index: x[i : i + 1], saved.state), digest)
