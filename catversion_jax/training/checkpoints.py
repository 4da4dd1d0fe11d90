"""Orbax checkpoints of a run: the training state, kilobytes unless the UNet is learned; folders named by the step."""

import contextlib
import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from catversion_jax.training.state import TrainState
from catversion_jax.utils.errors import StorageError, UserError, is_forbidden, short

for name in ("absl", "orbax"):
    logging.getLogger(name).setLevel(logging.ERROR)  # Orbax narrates every save


class Checkpoints:
    """The checkpoints below `folder`; saves run in the background, `close` waits for them."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: dict) -> None:
        """Save under `step`, unless it is there. Raises UserError if the disk refuses, older ones being kept."""
        if step == self.latest:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config))
        with explained(f"{self.folder / str(step)}: could not save the checkpoint"):
            self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, placed as `like` (arrays or shapes with shardings)."""
        try:
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
            )
            return self._manager.restore(self.latest, args=items).state
        except (OSError, ValueError, KeyError) as error:
            path = self.folder / str(self.latest)
            raise UserError(
                f"{path}: not a readable checkpoint ({short(error)}); remove it to resume from the one before"
            ) from None

    def note(self) -> dict:
        """The config that was saved with the latest state."""
        return self._manager.restore(self.latest, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config

    def close(self) -> None:
        """Wait for the saves under way."""
        with explained(f"{self.folder}: could not save the last checkpoint"):
            self._manager.wait_until_finished()
        self._manager.close()


@contextlib.contextmanager
def explained(what: str):
    """Turns what a storage library raises into one line."""
    try:
        yield
    except Exception as error:  # of the disk or the library, which wraps what the system said
        kind = UserError if is_forbidden(error) else StorageError
        raise kind(f"{what} ({short(error)}); make room, or grant access, and resume") from error
