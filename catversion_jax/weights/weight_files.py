"""The weights in one component's folder, whichever library wrote them: one file, or shards with an index."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.records import read_record
from catversion_jax.weights import msgpack, safetensors, torch_zip
from catversion_jax.weights.tensor import Tensor


class Format(NamedTuple):
    """A format of weights. `stems` are the file names of transformers and diffusers, without the extension."""

    stems: tuple[str, str]
    extension: str
    open: Callable[[Path], Mapping[str, Tensor]]
    is_flax: bool = False  # names and layouts are Flax's already


FORMATS = (
    Format(("model", "diffusion_pytorch_model"), "safetensors", safetensors.open_safetensors),
    Format(("pytorch_model", "diffusion_pytorch_model"), "bin", torch_zip.open_checkpoint),
    Format(("flax_model", "diffusion_flax_model"), "msgpack", msgpack.open_msgpack, is_flax=True),
)
"""In order of preference: the first one found in a folder is read."""


@dataclass(frozen=True)
class ShardIndex:
    """The file that says which shard holds which tensor."""

    weight_map: dict[str, str]


def file_patterns(form: Format, variant: str) -> list[str]:
    """The possible names of a format's files: one file, or an index and its shards (which are named in two ways)."""
    dot, shard = dotted(variant), "?????-of-?????"
    names = (
        "{stem}{dot}.{end}",
        "{stem}.{end}.index{dot}.json",
        "{stem}{dot}-{shard}.{end}",
        "{stem}-{shard}{dot}.{end}",
    )
    return [name.format(stem=stem, dot=dot, shard=shard, end=form.extension) for stem in form.stems for name in names]


def dotted(variant: str) -> str:
    return f".{variant}" if variant else ""


def find_weights(folder: Path, variant: str = "") -> tuple[Format, Path] | None:
    """Finds the file of a folder's weights, or the index of their shards; None if there are no weights."""
    for form in FORMATS:
        for name in file_patterns(form, variant):
            if (folder / name).is_file():  # never true for a pattern of shards
                return form, folder / name
    return None


def variants(folder: Path) -> list[str]:
    """The variants whose files are in a folder, such as "fp16"."""
    stems = "|".join(stem for form in FORMATS for stem in form.stems)
    ends = "|".join(form.extension for form in FORMATS)
    name = re.compile(rf"({stems})\.(?P<variant>\w+)(-\d{{5}}-of-\d{{5}})?\.({ends})")
    return sorted({match["variant"] for path in folder.iterdir() if (match := name.fullmatch(path.name))})


def open_weights(folder: Path, variant: str = "") -> tuple[Format, dict[str, Tensor]]:
    """Returns a folder's format and its tensors by name, unread. Raises UserError if they or a shard are missing."""
    found = find_weights(folder, variant)
    if found is None:
        expected = " or ".join(f"{stem}{dotted(variant)}.safetensors" for stem in FORMATS[0].stems)
        what = f" of config.model.variant={variant!r}" if variant else ""
        others = [other for other in variants(folder) if other != variant]
        hint = f"; there are those of variant {listed(others)}: set config.model.variant" if others else ""
        raise UserError(f"{folder}: no weights{what}; expected {expected}{hint}")
    form, path = found
    files = shards(path) if path.suffix == ".json" else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        opened = form.open(file)
        twice = sorted(tensors.keys() & opened.keys())
        if twice:
            raise UserError(f"{file}: tensor {twice[0]} is also in another shard; expected each tensor once")
        tensors |= opened
    return form, tensors


def shards(index: Path) -> list[Path]:
    """The files that an index lists. Raises UserError if one is missing."""
    names = sorted(set(read_record(index, ShardIndex, "expected an index of shards").weight_map.values()))
    # Names of files beside the index alone: one with a folder in it could lead out of the model's folder.
    missing = sorted(set(names) - {path.name for path in index.parent.iterdir()})
    if missing:
        raise UserError(f"{index}: lists shards that are not beside it: {listed(missing)}; download them again")
    return [index.parent / name for name in names]
