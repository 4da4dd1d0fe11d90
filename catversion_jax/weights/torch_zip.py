"""Reads files of torch.save: a zip of one pickle, which lists the tensors, and one entry of raw values per storage.

The format: https://docs.pytorch.org/docs/stable/notes/serialization.html. Nothing is unpickled (see pickle.py). A
tensor's values are read, and their checksum is verified, on demand.
"""

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.weights import pickle
from catversion_jax.weights.pickle import Foreign

MAX_PICKLE_BYTES = 16 * 2**20  # a checkpoint's pickle has a few hundred bytes per tensor
MAX_ENTRIES = 100_000
MAX_DIMENSIONS = 32
PLAIN_FLAGS = 0x0808  # of a zip entry: bit 3, sizes repeated behind the data; bit 11, names in UTF-8

DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}

BEGINNINGS = {
    b"PK": "cut short or damaged; copy or download it again",
    b"\x80\x02\x8a\n": "saved by PyTorch before 1.6; load it in PyTorch once, torch.save it again and take that file",
    b"": "expected a file of torch.save; give another one",
}
"""The first bytes of a file that is not a readable zip -> the error message."""


@dataclass(frozen=True)
class Storage:
    """A zip entry of `size` values."""

    archive: zipfile.ZipFile
    entry: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class ZipTensor:
    """A view of a storage; strides and offset count values, not bytes. Equal ones are the same view of one storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def path(self) -> Path:
        return Path(str(self.storage.archive.filename))

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def read(self) -> np.ndarray:
        """Returns the values in a new array. Raises UserError if they are damaged."""
        archive = self.storage.archive
        try:
            numbers = np.frombuffer(archive.read(self.storage.entry), self.dtype)
            strides = [stride * self.dtype.itemsize for stride in self.strides]
            return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides).copy()
        except (zipfile.BadZipFile, EOFError, ValueError, OverflowError) as error:
            raise UserError(f"{archive.filename}: damaged ({error}); copy or download it again") from error


@dataclass(frozen=True)
class Contents:
    """The contents of a file's pickle: dicts, lists, tuples, plain values, ZipTensor; Foreign for everything else."""

    value: Any
    foreign: frozenset[str]  # its names, without those that tensors need


def read_zip(path: Path) -> Contents:
    """Reads a file's contents but not its tensors. Raises UserError for what torch.save would not have written."""
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a file of torch.save")
    try:
        archive = zipfile.ZipFile(path)
        return read_archive(archive, check_entries(archive, path.stat().st_size))
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        with path.open("rb") as file:
            start = file.read(4)
        what = next(what for beginning, what in BEGINNINGS.items() if start.startswith(beginning))
        raise UserError(f"{path}: {what}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a file that torch.save writes ({error}); copy or download it again") from error


def check_entries(archive: zipfile.ZipFile, size: int) -> str:
    """Returns the folder in the zip that holds everything. Raises ValueError if they are not plain entries."""
    # A zip bomb needs compression, or entries that overlap; torch.save writes neither.
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES or len(entries) != len(archive.NameToInfo):
        raise ValueError(f"{len(entries)} zip entries, some of one name or more than {MAX_ENTRIES:,}")
    for entry in entries:
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & ~PLAIN_FLAGS
        inside = 0 <= entry.header_offset <= size - entry.file_size
        if not plain or not inside or entry.compress_size != entry.file_size:
            raise ValueError(f"zip entry {entry.filename!r:.80} is compressed, encrypted or reaches beyond the file")
        if len(entry.filename) > pickle.MAX_NAME:
            raise ValueError(f"zip entry {entry.filename!r:.80} has a name of more than {pickle.MAX_NAME} characters")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("zip entries that overlap")
    pickles = [name for name in archive.NameToInfo if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError(f"{len(pickles)} entries data.pkl, expected 1")
    return pickles[0].removesuffix("/data.pkl")


def read_archive(archive: zipfile.ZipFile, folder: str) -> Contents:
    sizes = {name: entry.file_size for name, entry in archive.NameToInfo.items()}
    if sizes[f"{folder}/data.pkl"] > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of more than {MAX_PICKLE_BYTES >> 20} MiB")
    order = f"{folder}/byteorder"  # since PyTorch 2.1
    if order in sizes and archive.read(order) != b"little":
        raise ValueError("numbers in big-endian order")

    def storage(identifier: Any) -> Storage | Foreign:
        match identifier:
            case ("storage", Foreign(name), str(key), str(), int(size)):
                pass
            case _:
                raise ValueError("a persistent id that names no storage")
        if name not in DTYPES:
            return Foreign(name)
        if len(key) > pickle.MAX_NAME:
            raise ValueError(f"storage {key[:80]!r} has a name of more than {pickle.MAX_NAME} characters")
        entry = f"{folder}/data/{key}"
        held = sizes.get(entry, "no")
        if held != size * DTYPES[name].itemsize:
            raise ValueError(f"storage {key!r:.80} has {held} bytes, expected {size} of {DTYPES[name]}")
        return Storage(archive, entry, DTYPES[name], size)

    functions: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": lambda: {},
        "torch._utils._rebuild_tensor_v2": view,
        "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    }
    value, names = pickle.read_pickle(archive.read(f"{folder}/data.pkl"), functions, storage)
    return Contents(value, names - functions.keys() - DTYPES.keys())


def view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> ZipTensor | Foreign:
    """Stands in for torch._utils._rebuild_tensor_v2. Raises ValueError for a view beyond its storage."""
    # All of it comes from the file, and as_strided in ZipTensor.read checks no bounds: it would read other memory.
    match storage, shape, strides:
        case Foreign(), _, _:
            return storage
        case Storage(), tuple(), tuple() if len(shape) == len(strides) <= MAX_DIMENSIONS:
            pass
        case _:
            raise ValueError("a tensor that is no view of a storage")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor whose shape, strides or offset are no sizes")
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    numbers = math.prod(shape)
    last = offset + sum(steps) if numbers else 0
    if numbers > storage.size or last >= storage.size > 0:
        raise ValueError(f"a tensor of {numbers} numbers that reaches beyond its storage of {storage.size}")
    return ZipTensor(storage, offset, shape, strides)


def open_checkpoint(path: Path) -> dict[str, ZipTensor]:
    """Returns the tensors by name, from a file of {name: tensor} or from the "state_dict" in it (a `.ckpt`).

    Whatever else a `.ckpt` holds is ignored. Raises UserError if a name holds something other than a tensor.
    """
    value = read_zip(path).value
    if isinstance(value, dict) and "string_to_param" in value:
        raise UserError(f"{path}: this is a Textual Inversion embedding, not a model; expected a model's state_dict")
    tensors = value.get("state_dict", value) if isinstance(value, dict) else value
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path}: expected tensors by name, or a state_dict of them; take the model's state_dict")
    for name, tensor in tensors.items():
        if len(name) > pickle.MAX_NAME:
            raise UserError(f"{path}: a tensor has a name of more than {pickle.MAX_NAME} characters; expected a model")
        if not isinstance(tensor, ZipTensor):
            kind = tensor.name if isinstance(tensor, Foreign) else type(tensor).__name__
            raise UserError(f"{path}: {name!r:.80} is no tensor but {kind!r:.80}; save the model's tensors alone")
    return tensors
