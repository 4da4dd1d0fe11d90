"""`concept.safetensors`: a concept and all that is needed to use it; kilobytes, unless its method changes the UNet."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from catversion_jax.base.pipeline import Networks
from catversion_jax.base.sampler_config import MAX_STRENGTH, SamplerConfig
from catversion_jax.methods import embedding_files, foreign_files, model_names
from catversion_jax.methods.base import Method, check_keys
from catversion_jax.methods.registry import METHODS, name_of
from catversion_jax.methods.textual_inversion import TextualInversion
from catversion_jax.utils import records, tree
from catversion_jax.utils.errors import UserError, listed, short
from catversion_jax.utils.paths import SCHEME, AnyPath, expand, local_copy
from catversion_jax.utils.settings import broken, is_text
from catversion_jax.utils.types import Params
from catversion_jax.weights import foreign, safetensors

FILE_NAME = "concept.safetensors"
PREVIEW = "preview.png"
"""The images of a few prompts, beside the concept."""
FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # a concept takes kilobytes; a larger file is something else
MAX_UNET_BYTES = 16 * 2**30  # unless its method changes the UNet
MAX_METADATA = 2**20  # characters; dozens of prompts take thousands


@dataclass(frozen=True)
class Concept:
    """A concept: its learned parameters, and how they were trained."""

    learned: Params  # nested dicts of float32 arrays, as `method` names them
    method: Method
    class_word: str  # "": unknown, as in the authors' files
    templates: tuple[str, ...]  # the training prompts' templates
    fingerprint: str  # of the text encoder it was trained in; "": unknown
    model_path: str  # "": the mini model; a file names a local model by its last part alone (model_names.py)
    steps: int
    learning_rate: float
    seed: int
    model_revision: str = ""  # how model_path was read, as in the config
    model_variant: str = ""
    model_prediction_type: str = ""
    strength: float = 1.0  # that it is sampled with: 0 is exactly the base model, 1 as trained
    sampler: SamplerConfig | None = None  # as in the config it was trained with; None: unknown

    def at(self, strength: float | None) -> "Concept":
        """The concept at another strength; None keeps its own."""
        return self if strength is None else dataclasses.replace(self, strength=strength)

    def save(self, path: str | AnyPath) -> None:
        """Writes the concept to a file, completely or not at all. Raises StorageError or UserError if that fails."""
        save(expand(path), self)

    @classmethod
    def load(cls, path: str | AnyPath) -> "Concept":
        """Reads a concept from its file or a run's folder, here or in a bucket. Raises UserError for another."""
        return load(path)

    @classmethod
    def from_pretrained(cls, repo: str, revision: str = "") -> "Concept":
        """Downloads a concept from Hugging Face by its name, owner/name. Raises UserError if there is none."""
        from catversion_jax.methods import hub_concepts  # which writes and reads concepts

        return hub_concepts.pull(repo, revision)

    def push_to_hub(self, repo: str, preview: str | AnyPath | None = None, private: bool = False) -> str:
        """Uploads the concept with a model card and a picture; returns the address of its page.

        Raises UserError if that fails.
        """
        from catversion_jax.methods import hub_concepts

        return hub_concepts.push(self, repo, None if preview is None else expand(preview), private)

    def metadata(self) -> dict[str, Any]:
        """Everything but the arrays, in JSON's types."""
        of_method = {} if self.method_name == DEFAULT_METHOD else {"method": self.method_name}
        values = {name: getattr(self, name) for name in FIELDS}
        values["model_path"] = model_names.public_name(self.model_path)
        sampler = self.sampler and {name: getattr(self.sampler, name) for name in SAMPLER}
        return of_method | self.method.metadata() | values | ({"sampler": sampler} if sampler else {})

    # Kept, as a concept that changes the UNet takes gigabytes.
    @functools.cached_property
    def digest(self) -> str:
        """Sixteen digits that tell concepts apart: a hash of what was learned and how it acts, at any strength."""
        acts = self.method.metadata() | {"method": self.method_name, "class_word": self.class_word}
        leaves = {name: tree.digest(np.asarray(leaf)) for name, leaf in flatten_dict(self.learned, sep="/").items()}
        return tree.fingerprint(leaves | {"": records.encode(sorted(acts.items())).encode()})

    @property
    def method_name(self) -> str:
        return name_of(self.method)


FIELDS = tuple(
    field.name for field in dataclasses.fields(Concept) if field.name not in ("learned", "method", "sampler")
)
SAMPLER = ("scheduler", "steps", "guidance")
"""The sampler's settings that are recorded; the batch size is left out, as it depends on the machine."""
OPTIONAL = {"model_revision", "model_variant", "model_prediction_type", "strength"}
"""Fields that a file may lack."""
RECORD = msgspec.defstruct(
    "RECORD",
    [
        (f.name, f.type) if f.default is dataclasses.MISSING else (f.name, f.type, f.default)
        for f in dataclasses.fields(Concept)
        if f.name in FIELDS
    ],
)
"""The type that checks FIELDS when they are read."""
DEFAULT_METHOD = "catversion"
"""The method of a file that names none."""


def save(path: AnyPath, concept: Concept) -> None:
    """Writes the file completely or not at all; equal concepts give equal files.

    Raises StorageError or UserError if that fails.
    """
    metadata = {name: records.encode(value) for name, value in concept.metadata().items()}
    metadata["format_version"] = records.encode(FORMAT_VERSION)
    arrays = flatten_dict(concept.learned, sep="/")
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    metadata["digest"] = records.encode(content_digest(tensors, metadata))
    safetensors.write_file(path, tensors, metadata)


def content_digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Hashes all that a file holds but the digest itself, so that a damaged file is told from a whole one."""
    hashed = hashlib.sha256(records.encode(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(name.encode() + b"\0" + tree.digest(tensor))
    return hashed.hexdigest()


def load(path: str | AnyPath) -> Concept:
    """Reads a concept from its file or its run directory. Raises UserError for anything else."""
    path = expand(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        what = "not a regular file" if path.exists() else "not found"
        folder = foreign.what_folder(path.parent) if path.name == FILE_NAME and path.parent.is_dir() else ""
        raise UserError(f"{path}: {folder}{what}; expected a learned concept; run catversion train first")
    with local_copy(path) as local:
        concept = load_local(local, local is path, path.stem)
    return dataclasses.replace(concept, model_path=model_names.local(concept.model_path, path))


def load_local(path: Path, keeps: bool, name: str) -> Concept:
    """Reads a concept's file of this machine; `keeps`: it stays there, so that large arrays may be mapped.

    `model_path` is as the file has it; `name` is the file's own, without its ending.
    """
    if path.suffix.lower() in embedding_files.ENDINGS and foreign_files.is_torch(path):
        return of_embedding(path, {}, name)
    texts, names = read_header(path)
    kind = foreign_files.kind_of_tensors(names)
    # diffusers saves an embedding by any word.
    is_one = kind is None and "format_version" not in texts and len(names) == 1 and names != ["prefix"]
    if is_one or (kind and kind.startswith(embedding_files.KIND)):
        return of_embedding(path, texts, name)
    if kind or "format_version" not in texts:
        said = kind or f"tensors {listed(names) or 'none'} of another program"
        hint = "; give it as --lora" if said == "a LoRA" else ""
        raise UserError(f"{path}: {said}; expected a concept of catversion train{hint}")
    again = f"expected a concept of format {FORMAT_VERSION}; copy it again"
    metadata = {name: records.decode(text, object, f"{path}: metadata {name}", again) for name, text in texts.items()}
    version = metadata.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this program reads version {FORMAT_VERSION}; update it")
    method = METHODS.get(str(metadata.pop("method", DEFAULT_METHOD)))
    if method is None:
        raise UserError(f"{path}: of an unknown method; expected one of {', '.join(METHODS)}; update this program")
    # A concept that changes the UNet takes gigabytes, and a benchmark opens many: these are memory-mapped.
    check_size(path, MAX_UNET_BYTES if method.changes_unet else MAX_BYTES)
    opened = safetensors.open_safetensors(path).items()
    tensors = {name: x.mapped() if method.changes_unet and keeps else x.read() for name, x in opened}
    recorded = metadata.pop("digest", None)  # older files have none
    if recorded is not None and recorded != content_digest(tensors, {k: v for k, v in texts.items() if k != "digest"}):
        raise UserError(f"{path}: damaged: its contents are not those that were written; copy it again")
    try:
        return parse_concept(method, metadata, tensors)
    # A file without a digest may name and shape its arrays in any way.
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {short(error)}; {again}") from error


def of_embedding(path: Path, texts: Mapping[str, str], name: str) -> Concept:
    """Reads another program's embedding as a concept of Textual Inversion, whose class word is the embedding's."""
    check_size(path, MAX_BYTES)
    word, learned = embedding_files.read_embedding(path, texts, name)
    if not is_text(word):
        raise UserError(f"{path}: its word holds a NUL or half of a character; expected text")
    method = TextualInversion(vectors=len(learned["word"]))
    unknown: dict[str, Any] = {"templates": (), "fingerprint": "", "model_path": "", "steps": 0, "learning_rate": 0.0}
    return Concept(learned, method, word, seed=0, **unknown)


def read_header(path: AnyPath) -> tuple[dict[str, str], list[str]]:
    """Returns a file's metadata and the names of its tensors. Raises UserError if it is no safetensors file."""
    try:
        with safe_open(path, framework="numpy") as file:
            texts, names = dict(file.metadata() or {}), list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        if kind := foreign_files.kind_of_file(path):
            raise UserError(f"{path}: {kind}; expected a concept of catversion train") from error
        raise UserError(f"{path}: not a readable concept ({short(error)}); train it again or copy it again") from error
    if sum(map(len, texts.values())) > MAX_METADATA:
        raise UserError(f"{path}: metadata of more than {MAX_METADATA} characters; expected a concept")
    return texts, names


def parse_concept(method: type[Method], metadata: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Concept:
    """Builds the concept of a file's metadata and tensors. Raises an error that says what is wrong with them."""
    values = {name: metadata.pop(name) for name in FIELDS if name in metadata}
    sampler = metadata.pop("sampler", None)
    check_keys(values, set(FIELDS), OPTIONAL)
    fields = msgspec.structs.asdict(msgspec.convert(values, RECORD))
    if not (0 <= fields["seed"] < 2**32 and 0 <= fields["steps"] < 2**31):
        raise ValueError(f"seed {fields['seed']}, steps {fields['steps']}; expected those of a run")
    if not 0 <= fields["strength"] <= MAX_STRENGTH:
        raise ValueError(f"strength {fields['strength']}; expected 0 to {MAX_STRENGTH:g}")
    if not (is_text(fields["model_path"]) and is_text(fields["class_word"])):
        raise ValueError("class_word or model_path with a NUL or half of a character; expected text")
    if fields["model_path"].startswith("~") or SCHEME.match(fields["model_path"]):
        raise ValueError(f"model_path {fields['model_path']!r}; expected a model's name")
    fields["sampler"] = None if sampler is None else read_sampler(sampler)
    if odd := [f"{name} {x.dtype}" for name, x in tensors.items() if x.dtype != np.float32]:
        raise ValueError(f"{odd[0]}; expected float32")
    if broken := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{broken[0]} holds NaN or infinity; expected numbers, train it again")
    learned = unflatten_dict(dict(tensors), sep="/")
    return Concept(learned, method.from_metadata(metadata, learned), **fields)


def read_sampler(values: Any) -> SamplerConfig:
    """Reads the sampler's settings of a file. Raises ValueError if one is not valid."""
    if not isinstance(values, dict):
        raise ValueError(f"sampler {values!r}; expected an object with {', '.join(SAMPLER)}")
    check_keys(values, set(SAMPLER))
    if type(values["steps"]) is not int:
        raise ValueError(f"sampler.steps={values['steps']!r}; expected a whole number")
    sampler = SamplerConfig(**values)
    for key, value, expected in broken(sampler):
        raise ValueError(f"sampler.{key}={value!r}; expected {expected}")
    return sampler


def check_size(path: AnyPath, most: int) -> None:
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
