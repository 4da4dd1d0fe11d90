"""Reads a pickle as data: its opcodes run on a small machine that imports nothing and calls only our own functions.

Python's unpickler imports the names in a file and calls them, so a downloaded checkpoint could run any code (see the
warning at https://docs.python.org/3/library/pickle.html). Here a name stays a name (`Foreign`), and a call is looked up
in a table; a call that is not in it gives another `Foreign`, which does nothing. The opcodes are
those of protocols 2 to 4 that torch.save writes; Python's pickletools defines them.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 500_000  # Stable Diffusion 1.5 with its averaged weights has about 60,000
MAX_NAME = 400  # characters


@dataclass(frozen=True, eq=False)
class Foreign:
    """A name in a pickle (`module.name`), or the result of calling it, which is never computed."""

    name: str


class Machine:
    """The unpickler's stack and memo. Dicts keep only entries whose keys are strings; no others are needed."""

    def __init__(self, functions: Mapping[str, Callable], persistent: Callable[[Any], Any]):
        self.functions, self.persistent = functions, persistent
        self.names: set[str] = set()
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stack below each mark
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.stack.pop() for _ in range(count)]))

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def keep(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def name(self, name: str) -> None:
        self.names.add(name)
        self.push(Foreign(name))

    def name_of(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no string")
        if len(module) + len(name) > MAX_NAME:  # a long one could be put together with many others
            raise ValueError(f"a name of more than {MAX_NAME} characters")
        self.name(f"{module}.{name}")

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Foreign) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no name")
        known = self.functions.get(function.name)
        self.push(known(*arguments) if known else Foreign(function.name))

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Foreign):
            raise ValueError("items for something that is no list")

    def update(self, items: list[Any]) -> None:
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))
        elif not isinstance(self.stack[-1], Foreign):
            raise ValueError("entries for something that is no dict")


CONSTANTS = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
)  # fmt: skip

OPCODES: dict[str, Callable[[Machine, Any], object]] = {
    **dict.fromkeys(CONSTANTS, Machine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push(Foreign("builtins.set")),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.push(m.pop(1)),
    "TUPLE2": lambda m, _: m.push(m.pop(2)),
    "TUPLE3": lambda m, _: m.push(m.pop(3)),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "MARK": lambda m, _: m.mark(),
    "APPEND": lambda m, _: m.extend([*m.pop(1)]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.extend(m.pop_mark())),
    "SETITEM": lambda m, _: m.update([*m.pop(2)]),
    "SETITEMS": lambda m, _: m.update(m.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Machine.keep),
    "MEMOIZE": lambda m, _: m.keep(len(m.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": lambda m, name: m.name_of(*name.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name_of(*m.pop(2)),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call(*m.pop(2))),
    "BUILD": lambda m, _: m.pop(1),  # an object's state is ignored
    "BINPERSID": lambda m, _: m.push(m.persistent(*m.pop(1))),
}
"""pickletools' name of an opcode -> its effect on the machine, given its argument."""


def read_pickle(
    data: bytes, functions: Mapping[str, Callable], persistent: Callable[[Any], Any]
) -> tuple[Any, frozenset[str]]:
    """Returns the value of a pickle and all names in it.

    Only `functions` (`module.name` -> function) and `persistent` (of a persistent id) are ever called. Raises
    ValueError for what torch.save would not have written.
    """
    machine = Machine(functions, persistent)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if opcode.name not in OPCODES:
                raise ValueError(f"opcode {opcode.name} at byte {position}")
            if count == MAX_OPCODES:
                raise ValueError(f"more than {MAX_OPCODES:,} opcodes")
            OPCODES[opcode.name](machine, argument)
        if machine.below or len(machine.stack) != 1:
            raise ValueError("a pickle of no value or several")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"malformed pickle: {type(error).__name__}") from error
    return machine.stack[0], frozenset(machine.names)
