"""The base model's name in a concept's file, which may be shared: a path of the person's machine stays there.

A model on Hugging Face keeps its name (owner/name). A local one is recorded by its last part, and found again by the
config of the run, which stays where the model is: `config.json` beside the concept or, in a batch, one folder above.
"""

import re

from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import AnyPath, expand

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_on_hub(model: str) -> bool:
    """Whether a model's path is a name on Hugging Face rather than a local path."""
    return bool(HUB_NAME.fullmatch(model)) and not model.startswith(".") and not expand(model).exists()


def public_name(model: str) -> str:
    """Returns what a file that may be shared records: a name on Hugging Face, or the last part of a local path."""
    return model if not model or is_on_hub(model) else expand(model).absolute().name


def local(recorded: str, concept: AnyPath) -> str:
    """Returns the path of the model that a concept's file records, by the config of the run that wrote it.

    It is the recorded name itself if the config is not there, or is of another model.
    """
    if not recorded or "/" in recorded:
        return recorded
    for folder in (concept.parent, concept.parent.parent):
        path = folder / "config.json"
        if path.is_file():
            try:
                model = records.read_record(path, dict[str, object]).get("model.path")
            except UserError:  # not a run's config
                continue
            if isinstance(model, str) and model and public_name(model) == recorded:
                return model
    return recorded
