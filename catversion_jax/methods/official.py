"""Reads and writes the adapter files of the paper's authors (github.com/RoyZhao926/CatVersion) without PyTorch.

`pytorch_adapter.bin` is a torch.save of one flat storage, our prefix [P, L, 2, H, D] flattened, listed under four
names. The format does not record class word, layers, bias and scope, which are fixed in the authors' code.
"""

import struct
import zipfile

import numpy as np

from catversion_jax.methods.catversion import CatVersion
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath
from catversion_jax.weights import torch_zip

FIXED = CatVersion(layers=((9, 10, 11),), logit_bias=1.0, scope="all")
SHAPE = (len(FIXED.layers[0]), 2, 12, 64)
"""[L, 2, H, D] in Stable Diffusion 1.5's text encoder."""

TAIL = "prefix_tunings.prefix_tuning1.clip_text_model_self_prefix.control_trans"
NAMES = (
    *(f"text_model.encoder.layers.{i}.self_attn.prefix_tuning.pool.{TAIL}" for i in FIXED.layers[0]),
    f"prefix_tuning.{TAIL}",
)


def read_adapter(path: AnyPath, class_word: str = "") -> Concept:
    """Reads an authors' adapter as a concept; unknown fields are empty. Raises UserError for any other file."""
    contents = torch_zip.read_zip(path)
    if contents.foreign:
        names = ", ".join(sorted(contents.foreign))
        raise UserError(f"{path}: refers to {names!r:.200}; expected tensors alone; do not trust this file")
    tensors = contents.value if isinstance(contents.value, dict) else {}
    if tensors.keys() != set(NAMES):
        raise UserError(f"{path}: expected an authors' adapter, {len(NAMES)} tensors named ...{TAIL}; give that file")
    tensor, *others = tensors.values()
    flat = isinstance(tensor, torch_zip.ZipTensor) and tensor.dtype == np.float32 and len(tensor.shape) == 1
    size = int(np.prod(SHAPE))
    if not flat or any(other != tensor for other in others) or not tensor.shape[0] or tensor.shape[0] % size:
        raise UserError(f"{path}: expected one flat float32 tensor of P x {size} numbers by all names; copy it again")
    return Concept(
        learned={"prefix": tensor.read().reshape(-1, *SHAPE)},
        method=FIXED,
        class_word=class_word,
        templates=(),
        fingerprint="",
        model_path="",
        steps=0,
        learning_rate=0.0,
        seed=0,
    )


def write_adapter(path: AnyPath, concept: Concept, source: AnyPath) -> None:
    """Writes the concept of `source` as an authors' adapter, or nothing. Raises UserError if that cannot hold it."""
    if not isinstance(concept.method, CatVersion):
        raise UserError(f"{source}: learned by {concept.method_name}; the authors' format holds catversion's alone")
    arrays = concept.learned
    fields = concept.method.metadata() | {name: ["P", *array.shape[1:]] for name, array in arrays.items()}
    expected = FIXED.metadata() | {"prefix": ["P", *SHAPE]}
    odd = [f"{name} {x} (only {expected.get(name)})" for name, x in fields.items() if x != expected.get(name)]
    if odd:
        raise UserError(f"{source}: the authors' format cannot hold {', '.join(odd)}; use the concept as it is")
    entries = {
        "data.pkl": listing(arrays["prefix"].size),
        "byteorder": b"little",
        "data/0": np.ascontiguousarray(arrays["prefix"], "<f4").tobytes(),
        "version": b"3\n",
    }

    def write_zip(temporary: AnyPath) -> None:
        with zipfile.ZipFile(temporary, "w") as file:
            for name, data in entries.items():
                # A bare ZipInfo has a fixed date, so equal concepts give equal files.
                file.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

    write_atomically(path, write_zip)


def listing(size: int) -> bytes:
    """The pickle of {name: a flat view of storage "0"} for NAMES, opcode by opcode."""
    # By hand: Python's pickler imports every name that it writes, and these are PyTorch's.

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(size) + b"tQ"
    shape, strides = integer(size) + b"\x85", integer(1) + b"\x85"
    no_gradient, no_hooks = b"\x89", b"ccollections\nOrderedDict\n)R"
    arguments = storage + integer(0) + shape + strides + no_gradient + no_hooks
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    return b"\x80\x02}(" + b"".join(text(name) + tensor for name in NAMES) + b"u."
