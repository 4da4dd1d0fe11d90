"""`concept.safetensors`: a concept and all that is needed to use it; kilobytes, unless its method changes the UNet."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.base import Method, check_keys
from catversion_jax.methods.registry import METHODS, name_of
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import flatten, follows
from catversion_jax.utils.types import Params
from catversion_jax.weights import safetensors

FILE_NAME = "concept.safetensors"
FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # a concept takes kilobytes; a larger file is something else
MAX_UNET_BYTES = 16 * 2**30  # unless its method changes the UNet


@dataclass(frozen=True)
class Concept:
    """A concept: its learned parameters, and how they were trained."""

    learned: Params  # nested dicts of float32 arrays, as `method` names them
    method: Method
    class_word: str  # "": unknown, as in the authors' files
    templates: tuple[str, ...]  # the training prompts' templates
    fingerprint: str  # of the text encoder it was trained in; "": unknown
    model_path: str  # "": the mini model
    steps: int
    learning_rate: float
    seed: int
    model_revision: str = ""  # how model_path was read, as in the config
    model_variant: str = ""
    model_prediction_type: str = ""
    sampler: SamplerConfig | None = None  # as in the config it was trained with; None: unknown

    def metadata(self) -> dict[str, Any]:
        """Everything but the arrays, in JSON's types."""
        of_method = {} if self.method_name == DEFAULT_METHOD else {"method": self.method_name}
        values = {name: getattr(self, name) for name in FIELDS}
        sampler = self.sampler and {name: getattr(self.sampler, name) for name in SAMPLER}
        return of_method | self.method.metadata() | values | ({"sampler": sampler} if sampler else {})

    @property
    def method_name(self) -> str:
        return name_of(self.method)


FIELDS = tuple(
    field.name for field in dataclasses.fields(Concept) if field.name not in ("learned", "method", "sampler")
)
SAMPLER = ("scheduler", "steps", "guidance")
"""The sampler's settings that are recorded; the batch size is left out, as it depends on the machine."""
OPTIONAL = {"model_revision", "model_variant", "model_prediction_type"}
"""Fields that a file may lack."""
DEFAULT_METHOD = "catversion"
"""The method of a file that names none."""


def save(path: Path, concept: Concept) -> None:
    """Writes the file completely or not at all. Raises StorageError or UserError if that fails."""
    metadata = {name: json.dumps(value) for name, value in concept.metadata().items()}
    metadata["format_version"] = json.dumps(FORMAT_VERSION)
    arrays = flatten_dict(concept.learned, sep="/")
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    safetensors.write_file(path, tensors, metadata)


def load(path: str | Path) -> Concept:
    """Reads a concept from its file or its run directory. Raises UserError for anything else."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a learned concept; run catversion train first")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            method = METHODS.get(metadata.pop("method", DEFAULT_METHOD))
        # A concept that changes the UNet takes gigabytes, and a benchmark opens many: these are memory-mapped.
        large = bool(method and method.changes_unet)
        check_size(path, MAX_UNET_BYTES if large else MAX_BYTES)
        tensors = {name: x.mapped() if large else x.read() for name, x in safetensors.open_safetensors(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable concept ({error}); train it again or copy it again") from error
    version = metadata.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this program reads version {FORMAT_VERSION}; update it")
    if method is None:
        raise UserError(f"{path}: of an unknown method; expected one of {', '.join(METHODS)}; update this program")
    values = {name: metadata.pop(name) for name in FIELDS if name in metadata}
    recorded = metadata.pop("sampler", None)
    try:
        check_keys(values, set(FIELDS), OPTIONAL)
        values["sampler"] = None if recorded is None else read_sampler(recorded)
        if odd := [f"{name} {x.dtype}" for name, x in tensors.items() if x.dtype != np.float32]:
            raise ValueError(f"{odd[0]}; expected float32")
        learned = unflatten_dict(tensors, sep="/")
        values["templates"] = tuple(values["templates"])
        return Concept(learned, method.from_metadata(metadata, learned), **values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}; expected a concept of format {FORMAT_VERSION}; copy it again") from error


def read_sampler(values: Any) -> SamplerConfig:
    """Reads the sampler's settings of a file. Raises ValueError if one is not valid."""
    if not isinstance(values, dict):
        raise ValueError(f"sampler {values!r}; expected an object with {', '.join(SAMPLER)}")
    check_keys(values, set(SAMPLER))
    if type(values["steps"]) is not int:
        raise ValueError(f"sampler.steps={values['steps']!r}; expected a whole number")
    sampler = SamplerConfig(**values)
    for key, field, value in flatten(sampler):
        if not follows(field.metadata["constraint"], value):
            raise ValueError(f"sampler.{key}={value!r}; expected {field.metadata['constraint'].expected}")
    return sampler


def check_size(path: Path, most: int) -> None:
    if path.stat().st_size > most:
        size = "a few kilobytes" if most == MAX_BYTES else f"at most {most >> 30} GiB"
        raise UserError(f"{path}: {path.stat().st_size >> 20} MiB; expected a concept of {size}")


def check_model(concept: Concept, fingerprint: str, networks: Networks, source: str, model: str) -> list[str]:
    """Raises UserError if a concept was trained in another text encoder than the model's, or does not fit its networks.

    Returns warnings: if the concept does not record its text encoder, only the shapes were compared.
    """
    if concept.fingerprint not in ("", fingerprint):
        raise UserError(
            f"{source}: learned in text encoder {concept.fingerprint}, but {model} has {fingerprint}; "
            f"a concept works only with the base model it was learned on ({concept.model_path or 'the mini model'}); "
            "give that one"
        )
    if misfit := concept.method.misfit(concept.learned, networks):
        raise UserError(f"{source}: {misfit} ({model}); give the base model it was learned on")
    if concept.fingerprint:
        return []
    return [f"{source} does not tell its base model; the shapes fit {model}, and nothing else was compared"]
