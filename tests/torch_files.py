"""Write the files of torch.save without PyTorch, and files that it would never write."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

STORAGES = {
    np.dtype(dtype): f"{name}Storage"
    for dtype, name in [
        ("f4", "Float"), ("f2", "Half"), (jnp.bfloat16, "BFloat16"), ("f8", "Double"), ("i8", "Long"), ("?", "Bool"),
    ]
}  # fmt: skip


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """REDUCE, and BUILD where there is a state."""

    function: object
    arguments: tuple
    state: object = None


@dataclass(frozen=True)
class Raw:
    """Opcodes as they are."""

    opcodes: bytes


@dataclass(frozen=True)
class View:
    """A tensor: a view of the storage under a key."""

    key: str
    dtype: object
    size: int
    shape: tuple
    strides: tuple
    offset: int = 0


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Global("collections", "OrderedDict")


def encode(value) -> bytes:
    """The opcodes that leave `value` on the stack."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
        case Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            built = b"" if value.state is None else encode(value.state) + b"b"
            return encode(value.function) + encode(value.arguments) + b"R" + built
        case Raw():
            return value.opcodes
        case View():
            kind = Global("torch", STORAGES[np.dtype(value.dtype)])
            storage = Raw(encode(("storage", kind, value.key, "cpu", value.size)) + b"Q")
            hooks = Call(ORDERED_DICT, ())
            return encode(Call(REBUILD, (storage, value.offset, value.shape, value.strides, False, hooks)))
    raise TypeError(value)


def whole(key: str, array: np.ndarray) -> View:
    """All of a contiguous array's own storage."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return View(key, array.dtype, array.size, array.shape, strides)


def save(path: Path, value, storages: dict[str, np.ndarray], compression=zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """A zip of the value's pickle and its storages; `entries` adds to them or replaces them."""
    files = {"data.pkl": b"\x80\x02" + encode(value) + b".", "version": b"3\n"}
    files |= {f"data/{key}": np.ascontiguousarray(array).tobytes() for key, array in storages.items()} | entries
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in files.items():
            file.writestr(f"archive/{name}", data)
    return path


def save_tensors(path: Path, tensors: dict[str, np.ndarray], **others) -> Path:
    """{"state_dict": tensors, others...} as PyTorch Lightning has it; without `others` the tensors alone."""
    views = {name: whole(str(i), array) for i, (name, array) in enumerate(tensors.items())}
    storages = {str(i): array for i, array in enumerate(tensors.values())}
    return save(path, {"state_dict": views} | others if others else views, storages)
