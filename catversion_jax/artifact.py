"""`concept.safetensors`: a learned concept, a few kilobytes, with all that is needed to use it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from catversion_jax.adapter import SCOPES
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.types import Float

FILE_NAME = "concept.safetensors"
FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # a concept is kilobytes; what is larger is something else


@dataclass(frozen=True)
class Concept:
    """A prefix and where it came from. All fields but `prefix` are the file's metadata, as JSON values."""

    prefix: Float[np.ndarray, "P L 2 H D"]  # float32
    class_word: str
    templates: tuple[str, ...]  # the training prompts' templates
    layers: tuple[int, ...]  # of the text encoder, ascending
    logit_bias: float
    scope: str
    fingerprint: str  # of the text encoder it was learned in
    model_path: str  # "": the mini model
    steps: int
    learning_rate: float
    seed: int


METADATA = {field.name: field.type for field in dataclasses.fields(Concept) if field.name != "prefix"}


def save(path: Path, concept: Concept) -> None:
    """Write the file, whole or not at all."""
    metadata = {name: json.dumps(getattr(concept, name)) for name in METADATA}
    metadata["format_version"] = json.dumps(FORMAT_VERSION)
    tensors = {"prefix": np.ascontiguousarray(concept.prefix, np.float32)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load(path: str | Path) -> Concept:
    """Read a concept from its file or its run directory. Raises UserError for anything that is not one."""
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a learned concept; run catversion train first")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: {path.stat().st_size >> 20} MiB; expected a concept of a few kilobytes")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            prefix = file.get_tensor("prefix")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable concept ({error}); train it again or copy it again") from None
    version = metadata.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this program reads version {FORMAT_VERSION}; update it")
    if metadata.keys() != METADATA.keys():
        odd = ", ".join(sorted(metadata.keys() ^ METADATA.keys()))
        raise UserError(f"{path}: metadata missing or unknown: {odd}; expected those of format {FORMAT_VERSION}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in metadata.items()}
    concept = Concept(prefix=prefix, **values)
    if prefix.ndim != 5 or prefix.dtype != np.float32 or prefix.shape[1:3] != (len(concept.layers), 2):
        shape = f"[P, {len(concept.layers)}, 2, heads, head_dim]"
        raise UserError(f"{path}: prefix {prefix.dtype} {list(prefix.shape)}; expected float32 {shape}")
    if concept.scope not in SCOPES:
        raise UserError(f"{path}: scope {concept.scope!r}; expected one of {', '.join(SCOPES)}")
    return concept


def check_model(concept: Concept, fingerprint: str, source: str, model: str) -> None:
    """Raise UserError where a concept was learned in another text encoder than the model's."""
    if concept.fingerprint != fingerprint:
        raise UserError(
            f"{source}: learned in text encoder {concept.fingerprint}, but {model} has {fingerprint}; "
            f"a concept works only with the base model it was learned on ({concept.model_path or 'the mini model'}); "
            "name that one with --model"
        )
