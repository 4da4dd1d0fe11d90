"""The results of a batch: what became of each concept, in a folder of its own below the run's."""

from collections.abc import Callable
from dataclasses import dataclass

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import PREVIEW, Concept
from catversion_jax.training.checkpoints import explained
from catversion_jax.training.engine import Ended
from catversion_jax.training.previews import sample_preview
from catversion_jax.training.status import write_status
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, make_folder


@dataclass(frozen=True)
class Results:
    """Where the results go; `check` raises StorageError if this process may no longer write there."""

    folder: AnyPath
    pipeline: BasePipeline
    check: Callable[[], None]

    def write(self, ended: Ended) -> None:
        """Writes what became of a concept: what it learned and its preview, or why it failed."""
        status, concept, config = ended
        folder = self.folder / status.id
        self.check()
        if concept is not None:
            path = folder / concept_file.FILE_NAME
            with explained(f"{path}: could not write the concept"):
                make_folder(folder)
                concept_file.save(path, concept)
        write_status(folder, status)
        if concept is not None and config is not None:
            self.write_preview(folder, config, concept)

    def write_preview(self, folder: AnyPath, config: Config, concept: Concept) -> None:
        """Samples a few prompts with a concept that is done; one that gives no images is done all the same."""
        count = config.batch.previews
        if count == 0:
            return
        try:
            image = sample_preview(config, self.pipeline, concept, count)
        except UserError as error:
            warn(f"{folder.name}: no {PREVIEW}: {error}")
            return
        path = folder / PREVIEW
        with explained(f"{path}: could not write the preview"):
            write_atomically(path, image.save)
