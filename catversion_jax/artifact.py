"""`concept.safetensors`: a learned concept, a few kilobytes, with all that is needed to use it."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from catversion_jax.adapter import SCOPES
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.models.clip import CLIPTextConfig
from catversion_jax.types import Float

FILE_NAME = "concept.safetensors"
FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # a concept is kilobytes; what is larger is something else


@dataclass(frozen=True)
class Concept:
    """A prefix and where it came from. TENSORS are arrays, all other fields the file's metadata, as JSON values."""

    prefix: Float[np.ndarray, "P L 2 H D"]  # float32
    class_word: str  # "": not known, as in the authors' files
    templates: tuple[str, ...]  # the training prompts' templates
    layers: tuple[int, ...]  # of the text encoder, ascending
    logit_bias: float
    scope: str
    fingerprint: str  # of the text encoder it was learned in; "": not known
    model_path: str  # "": the mini model
    steps: int
    learning_rate: float
    seed: int
    prefix_2: Float[np.ndarray, "P L 2 H D"] | None = None  # in the second text encoder of SDXL
    layers_2: tuple[int, ...] | None = None
    model_revision: str = ""  # how model_path was read, as in the config
    model_variant: str = ""
    model_prediction_type: str = ""

    @property
    def prefixes(self) -> tuple[Float[np.ndarray, "P L 2 H D"], ...]:
        """One for each text encoder."""
        return (self.prefix,) if self.prefix_2 is None else (self.prefix, self.prefix_2)

    @property
    def encoder_layers(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each text encoder that hold a prefix."""
        return (self.layers,) if self.layers_2 is None else (self.layers, self.layers_2)


TENSORS = {"prefix": "layers", "prefix_2": "layers_2"}
"""Each tensor -> the field with its layers."""
METADATA = [field.name for field in dataclasses.fields(Concept) if field.name not in TENSORS]
OPTIONAL = {"layers_2", "model_revision", "model_variant", "model_prediction_type"}
"""Fields that a file may lack."""


def save(path: Path, concept: Concept) -> None:
    """Write the file, whole or not at all."""
    values = {name: getattr(concept, name) for name in (*METADATA, *TENSORS)}
    written = {name: value for name, value in values.items() if value is not None}
    metadata = {name: json.dumps(written[name]) for name in METADATA if name in written}
    metadata["format_version"] = json.dumps(FORMAT_VERSION)
    tensors = {name: np.ascontiguousarray(written[name], np.float32) for name in TENSORS if name in written}
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable concept ({error}); train it again or copy it again") from None
    version = metadata.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this program reads version {FORMAT_VERSION}; update it")
    if odd := sorted((metadata.keys() ^ METADATA) - OPTIONAL):
        odd = ", ".join(odd)
        raise UserError(f"{path}: metadata missing or unknown: {odd}; expected those of format {FORMAT_VERSION}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in metadata.items()}
    expected = [name for name, layers in TENSORS.items() if layers in values]
    if sorted(tensors) != expected:
        raise UserError(f"{path}: tensors {sorted(tensors)}; expected {expected}")
    concept = Concept(**tensors, **values)
    for name, layers in zip(expected, concept.encoder_layers, strict=True):
        shape, dtype = tensors[name].shape, tensors[name].dtype
        if len(shape) != 5 or dtype != np.float32 or shape[1:3] != (len(layers), 2):
            wanted = f"[P, {len(layers)}, 2, heads, head_dim]"
            raise UserError(f"{path}: {name} {dtype} {list(shape)}; expected float32 {wanted}")
    if concept.scope not in SCOPES:
        raise UserError(f"{path}: scope {concept.scope!r}; expected one of {', '.join(SCOPES)}")
    return concept


def check_model(
    concept: Concept, fingerprint: str, texts: Sequence[CLIPTextConfig], source: str, model: str
) -> list[str]:
    """Raise UserError where a concept was learned in another text encoder than the model's. Returns what to warn of:
    where the concept does not tell its text encoder, only the shapes were compared."""
    if concept.fingerprint not in ("", fingerprint):
        raise UserError(
            f"{source}: learned in text encoder {concept.fingerprint}, but {model} has {fingerprint}; "
            f"a concept works only with the base model it was learned on ({concept.model_path or 'the mini model'}); "
            "name that one with --model"
        )
    if len(texts) != len(concept.prefixes):
        raise UserError(
            f"{source}: for {len(concept.prefixes)} text encoders, but {model} has {len(texts)}; "
            "name the base model it was learned on with --model"
        )
    for text, prefix, layers in zip(texts, concept.prefixes, concept.encoder_layers, strict=True):
        heads, depth = text.heads, text.num_hidden_layers
        if prefix.shape[3:] != heads or not set(layers) <= set(range(depth)):
            raise UserError(
                f"{source}: [heads, head_dim] {[*prefix.shape[3:]]} in layers {[*layers]}, but the text "
                f"encoder of {model} has {[*heads]} in layers 0 to {depth - 1}; "
                "name the base model it was learned on with --model"
            )
    if concept.fingerprint:
        return []
    return [f"{source} does not tell its base model; the shapes fit {model}, and nothing else was compared"]
