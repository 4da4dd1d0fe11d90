"""Reads safetensors files (https://huggingface.co/docs/safetensors); nothing is unpickled."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from msgspec import Raw
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from catversion_jax.utils.errors import UserError, kind_of, listed, short
from catversion_jax.utils.files import MIB, open_regular, write_atomically
from catversion_jax.utils.records import decode
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


MAX_HEADER_BYTES = 32 * MIB
"""Stable Diffusion XL's header has 0.3 MiB; what a training tool says in it can be a few."""
UNREADABLE = "not a readable safetensors file ({}); copy or download it again"


@dataclass(frozen=True)
class HeaderEntry:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def open_safetensors(path: Path) -> dict[str, FileTensor]:
    """Returns the tensors by name, unread. Raises UserError for anything else."""
    start, header = read_entries(path)
    # The library validates the file, but the tensors are read by offset: threads open the file once per tensor, and the
    # library would parse its header each time (8 seconds for Stable Diffusion XL).
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {UNREADABLE.format(short(error))}") from error
    tensors = {
        name: decode(entry, HeaderEntry, f"{path}: tensor {name}", "copy or download it again")
        for name, entry in header.items()
        if name != "__metadata__"
    }
    other = sorted({tensor.dtype for tensor in tensors.values()} - DTYPES.keys())
    if other:
        raise UserError(f"{path}: numbers of type {listed(other)}; expected a file of float16, bfloat16 or float32")
    return {
        name: FileTensor(path, start + tensor.data_offsets[0], tensor.shape, DTYPES[tensor.dtype])
        for name, tensor in tensors.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """Returns what a file says of itself, by key. Raises UserError for anything but a safetensors file."""
    _, header = read_entries(path)
    said = header.get("__metadata__", b"{}")
    return decode(said, dict[str, str], f"{path}: __metadata__", "copy or download it again")


def read_entries(path: Path) -> tuple[int, dict[str, Raw]]:
    """Returns the byte at which the tensors begin, and the header's entries, not yet parsed."""
    with open_regular(path, "expected a safetensors file") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            what = f"its header would have more than {MAX_HEADER_BYTES // MIB} MiB"
            raise UserError(f"{path}: {UNREADABLE.format(what)}")
        data = file.read(length)
    if len(data) < length:
        raise UserError(f"{path}: {UNREADABLE.format('it ends within its header')}")
    what = UNREADABLE.format("its header is no JSON object")
    return 8 + length, decode(data, dict[str, Raw], str(path), what)


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
