"""What a compiled program runs and moves, read from its text: the kernels of a step, and the bytes of each."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

SIZES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8, "c128": 16,
}  # fmt: skip
"""Bytes of XLA's types."""
FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier", "iota",
    "copy-done", "slice-done", "ConcatBitcast",
}  # fmt: skip
"""Kinds that run nothing."""
PREFETCHES = {"copy-start": 0, "slice-start": 1}
"""A TPU's copies beside its kernels, between main and fast memory -> which array of their type is copied to."""

COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
TARGET = re.compile(r'custom_call_target="([^"]+)"')
CALLED = re.compile(r"calls=%?([\w.\-]+)")
BODY = re.compile(r"body=%?([\w.\-]+)")
NAME = re.compile(r"%([\w.\-]+)")


class Launch(NamedTuple):
    """A kernel that a program launches."""

    kind: str  # dot, reduce, transpose, ...: the first of KINDS in it; or what it calls
    bytes: int  # of its operands and results in the device's main memory
    text: str  # its instruction


KINDS = ("dot", "convolution", "reduce", "concatenate", "transpose", "copy", "slice", "dynamic-slice")
"""What a fusion is called after, if it has it; else it is elementwise."""


@dataclass(frozen=True)
class Program:
    """The kernels of a step."""

    kernels: tuple[Launch, ...]

    @property
    def bytes(self) -> int:
        """The bytes that the kernels of a step read and write: more than reach the memory, because of caches."""
        return sum(kernel.bytes for kernel in self.kernels)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Returns how many kernels there are of each kind, and their bytes, the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for kernel in self.kernels:
            count, size = found.get(kernel.kind, (0, 0))
            found[kernel.kind] = (count + 1, size + kernel.bytes)
        return dict(sorted(found.items(), key=lambda entry: -entry[1][1]))


class Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    rest: str  # from its operands on


def read_program(text: str) -> Program:
    """Reads XLA's text of a compiled program; of one with loops, the body of the largest."""
    computations = dict(read_computations(text))
    types = {instruction.name: instruction.type for found in computations.values() for instruction in found}
    bodies = [name for name in BODY.findall(text) if name in computations]
    # The entry comes last; a loop over the steps is larger than what is around it.
    main = max([*bodies, list(computations)[-1]], key=lambda name: len(computations[name]))
    kernels = []
    for instruction in computations[main]:
        kind = kind_of_kernel(instruction, computations)
        if kind not in FREE:
            line = f"{instruction.type} {instruction.operation}({instruction.rest}"
            kernels.append(Launch(kind, bytes_of_kernel(instruction, types), line))
    return Program(tuple(kernels))


def bytes_of_kernel(instruction: Instruction, types: dict[str, str]) -> int:
    """Returns the bytes that an instruction reads from the main memory, and writes to it."""
    if instruction.operation in PREFETCHES:
        to = ARRAY.findall(instruction.type)[PREFETCHES[instruction.operation]]
        return array_bytes("".join("{}[{}]".format(*to[:2])))
    operands = NAME.findall(instruction.rest.split("), ")[0])
    return array_bytes(instruction.type) + sum(array_bytes(types.get(name, "")) for name in operands)


def read_computations(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    name, found = "", list[Instruction]()
    for line in text.splitlines():
        if not line.startswith(" ") and (begins := COMPUTATION.match(line)):
            name, found = begins[1], []
        # Exactly that: a TPU kernel's metadata has lines of its own, which may begin with one.
        elif line == "}" and name:
            yield name, found
            name = ""
        elif name and (match := INSTRUCTION.match(line)):
            found.append(Instruction(*match.groups()))


def array_bytes(type_text: str) -> int:
    """Returns the bytes of the arrays that a type names, but for those in a memory of their own, as a TPU's VMEM."""
    found = (each for each in ARRAY.findall(type_text) if "S(" not in each[2])
    arrays = ((kind, map(int, filter(None, shape.split(",")))) for kind, shape, _ in found)
    return sum(SIZES[kind] * math.prod(sides) for kind, sides in arrays)


def kind_of_kernel(instruction: Instruction, computations: dict[str, list[Instruction]]) -> str:
    if instruction.operation == "custom-call" and (target := TARGET.search(instruction.rest)):
        return target[1]
    if instruction.operation == "fusion" and (called := CALLED.search(instruction.rest)):
        inside = {inner.operation for inner in computations.get(called[1], ())}
        return next((kind for kind in KINDS if kind in inside), "elementwise")
    return instruction.operation
