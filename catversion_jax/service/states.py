"""The states of the concepts in training, in a folder of the store: one checkpoint has those of all.

Whoever trains saves here, so that a server goes on from what another one saved, with or without a cluster.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from catversion_jax.training.checkpoints import Checkpoints, open_checkpoints, saved_steps
from catversion_jax.training.interrupted import InterruptedConcept, note_of, read_interrupted
from catversion_jax.training.step import StepConfig
from catversion_jax.utils.errors import ReportedError
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import remove_folder


class States:
    """The folder. Saves go on in the background; `close` waits for them."""

    def __init__(self, folder: Path, keep: int):
        """At most `keep` checkpoints stay."""
        self.folder, self._keep = folder, keep
        self._open: Checkpoints | None = None
        self._number = next(iter(saved_steps(folder)), 0)

    def read(self, step: StepConfig, wanted: Collection[str]) -> dict[str, InterruptedConcept]:
        """Returns the states of the concepts that are `wanted`, by id, as far as there are any."""
        saved = read_interrupted([self.folder], step)
        return {concept_id: state for concept_id, state in saved.items() if concept_id in wanted}

    def save(self, states: Mapping[str, InterruptedConcept]) -> None:
        """Saves the states, by id. Raises UserError or StorageError; what was saved before stays."""
        if not states:
            return
        whole = jax.tree.map(lambda *each: np.concatenate(each), *(one.state for one in states.values()))
        note = note_of([(concept_id, one.digest) for concept_id, one in states.items()])
        # Orbax's manager does not outlive a failure. That may be of an earlier save in the background, if it was open
        # before: then this one is tried again with a new one.
        for is_last in (True,) if self._open is None else (False, True):
            try:
                if self._open is None:
                    self._open = open_checkpoints(self.folder, self._keep, lambda: None)
                self._number += 1
                self._open.save(self._number, whole, note)
                return
            except ReportedError:
                self._give_up()
                if is_last:
                    raise

    def replace(self, states: Mapping[str, InterruptedConcept]) -> None:
        """Saves the states in place of all that was saved before, which goes even if there is no room for them."""
        self._give_up()
        if not states:
            remove_folder(self.folder)
            return
        before = saved_steps(self.folder)
        try:
            self.save(states)
            self.close()
        except ReportedError as error:
            warn(f"{error}; until the next save, what was learned so far is not saved")
            self._give_up()
            remove_folder(self.folder)
        for number in before:
            remove_folder(self.folder / str(number))

    def close(self) -> None:
        """Waits for what is being saved. Raises UserError or StorageError if that failed."""
        if self._open is not None:
            closing, self._open = self._open, None
            closing.close()

    def _give_up(self) -> None:
        """Closes checkpoints whose last save failed, which was said already, or is not wanted any more."""
        with suppress(ReportedError):
            self.close()
