"""Reads safetensors files (https://huggingface.co/docs/safetensors); nothing is unpickled."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from catversion_jax.utils.errors import UserError, kind_of, short
from catversion_jax.utils.files import write_atomically
from catversion_jax.weights.tensor import FileTensor

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def open_safetensors(path: Path) -> dict[str, FileTensor]:
    """Returns the tensors by name, unread. Raises UserError for anything else."""
    # The library validates the file, but the tensors are read by offset: threads open the file once per tensor, and the
    # library would parse its header each time (8 seconds for Stable Diffusion XL).
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    other = sorted({entry["dtype"] for entry in tensors.values()} - DTYPES.keys())
    if other:
        raise UserError(f"{path}: numbers of type {', '.join(other)}; expected a file of float16, bfloat16 or float32")
    return {
        name: FileTensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]])
        for name, entry in tensors.items()
    }


def write_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a file completely or not at all. Raises StorageError, or UserError if access is denied."""

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata)
        sort_header(temporary)

    try:
        write_atomically(path, write)
    except SafetensorError as error:  # what the system said, in the library's own type
        raise kind_of(error)(f"{path}: could not be written ({short(error)}); make room, or grant access") from error


def sort_header(path: Path) -> None:
    """Sorts the keys of a file's header, which the library writes in any order: equal contents give equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))
