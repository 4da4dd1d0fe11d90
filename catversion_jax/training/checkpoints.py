"""Orbax checkpoints of the training state, in folders named by step; kilobytes, unless the method trains the UNet."""

import contextlib
import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from catversion_jax.training.state import TrainState
from catversion_jax.utils.errors import StorageError, UserError, is_storage_error, kind_of, short

# Orbax logs several lines for every save, through both loggers.
for name in ("absl", "orbax"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints in `folder`. Saves run in the background; `close` waits for them."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        # A process that is killed during a save leaves a temporary folder behind, which the next run removes.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: dict) -> None:
        """Saves the state under `step`, unless it is there. Earlier checkpoints are kept if the save fails.

        Raises UserError if access is denied, StorageError for other failures.
        """
        if step == self.latest:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config))
        with explained(f"{self.folder / str(step)}: could not save the checkpoint"):
            self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> TrainState:
        """Returns the latest state, with the sharding of `like` (arrays, or shapes with shardings).

        Raises UserError if the checkpoint is not readable.
        """
        try:
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
            )
            return self._manager.restore(self.latest, args=items).state
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(error) from error

    def note(self) -> dict:
        """Returns the config saved with the latest state. Raises UserError if the checkpoint is not readable."""
        try:
            return self._manager.restore(self.latest, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError | StorageError:
        path = self.folder / str(self.latest)
        if is_storage_error(error):
            return StorageError(f"{path}: could not be read ({short(error)}); try again once the disk is well")
        return UserError(f"{path}: not a readable checkpoint ({short(error)}); remove it to resume from the one before")

    def close(self) -> None:
        """Waits for pending saves. Raises UserError or StorageError, as `save` does, if one of them failed."""
        with explained(f"{self.folder}: could not save the last checkpoint"):
            self._manager.wait_until_finished()
        self._manager.close()


@contextlib.contextmanager
def explained(what: str):
    """Turns what a storage library raises into a UserError or StorageError of one line."""
    try:
        yield
    except (UserError, StorageError):
        raise
    # Not OSError alone: Orbax and TensorStore wrap the system's error in types of their own.
    except Exception as error:
        raise kind_of(error)(f"{what} ({short(error)}); make room, or grant access, and resume") from error
