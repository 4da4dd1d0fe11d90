"""Apply a conversion table to the tensors of a PyTorch checkpoint."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Params
from catversion_jax.weights.rules import LEAVES, Rule, same
from catversion_jax.weights.tensor import Tensor

THREADS = 4
"""Tensors read and laid out at a time: enough to keep up with a disk, few enough to need little memory."""


class Target(NamedTuple):
    """A parameter, and what makes it of its tensor."""

    path: str
    op: Callable[[np.ndarray], np.ndarray]


def compile_rules(rules: Iterable[Rule]) -> list[tuple[re.Pattern, list[Target]]]:
    """A pattern of tensor names for each tensor of every rule, and the parts it fills, with {i} in their paths."""
    compiled = []
    for rule in rules:
        for torch_leaf, leaves in LEAVES[rule.kind].items():
            name = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(f"{rule.torch}.{torch_leaf}".removesuffix(".")))
            paths = [(f"{rule.flax}/{leaf}".removesuffix("/"), op) for leaf, op in leaves if rule.flax is not None]
            compiled.append((re.compile(name), [Target(*part) for part in paths]))
    return compiled


def matches(compiled: list[tuple[re.Pattern, list[Target]]], name: str) -> list[list[Target]]:
    """What a tensor fills by each rule that knows its name."""
    return [
        [Target(path.format(**match.groupdict()), op) for path, op in parts]
        for pattern, parts in compiled
        if (match := pattern.fullmatch(name))
    ]


def plan(
    tensors: Mapping[str, Tensor | np.ndarray], rules: Iterable[Rule] | None, expected: Params, source: str
) -> dict[str, list[Target]]:
    """Which parameters each tensor fills; no tensor is read. Without rules, names and layouts are Flax's already.

    Raises UserError, naming `source`, that lists every tensor that no rule or more than one rule matches, two tensors
    with one target, targets that the model does not have, parameters that nothing filled, and wrong shapes.
    """
    find = partial(matches, compile_rules(rules)) if rules is not None else lambda name: [[Target(name, same)]]
    shapes = {path: leaf.shape for path, leaf in flatten_dict(expected, sep="/").items()}
    planned: dict[str, list[Target]] = {}
    filled: set[str] = set()
    problems: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        found = find(name)
        if len(found) != 1:
            problems.setdefault("no rule for" if not found else "several rules for", []).append(name)
            continue
        for part in found[0]:
            path = part.path
            if path not in shapes:
                problems.setdefault("not part of this model", []).append(name)
            elif path in filled:
                problems.setdefault("given twice", []).append(f"{path} (again as {name})")
            elif layout(part.op, tensor.shape) != shapes[path]:
                wrong = f"{name} {tuple(tensor.shape)}, expected {shapes[path]} as {path}"
                problems.setdefault("wrong shape", []).append(wrong)
            else:
                filled.add(path)
                planned.setdefault(name, []).append(part)
    missing = shapes.keys() - filled
    if missing and "wrong shape" not in problems:
        problems["missing"] = sorted(missing)
    if problems:
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items())
        raise UserError(f"{source}: does not fit the model its config.json describes: {listed}")
    return planned


def layout(op: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a layout op gives; None where it cannot take a tensor of that shape."""
    try:
        return op(np.broadcast_to(np.float16(0), shape)).shape
    except (ValueError, IndexError):
        return None


@contextlib.contextmanager
def readers() -> Iterator[Executor]:
    """Threads that read tensors; after an error (a damaged file, Ctrl-C) the rest is not read."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


Convert = Callable[[Target, np.ndarray], Any]
"""Makes of a tensor, as the file has it, what the tree shall hold for a part of it: an array on the device."""


def submit(
    pool: Executor,
    tensors: Mapping[str, Tensor | np.ndarray],
    rules: Iterable[Rule] | None,
    expected: Params,
    source: str,
    convert: Convert = lambda part, tensor: part.op(tensor),
) -> list[Future]:
    """Begin to read the Flax parameters `expected` (a tree of shapes) from PyTorch's `tensors`, a few at a time.

    `convert` is called in several threads. Raises UserError as `plan` does, before any tensor is read.
    """

    def fill(tensor: Tensor | np.ndarray, parts: list[Target]) -> list[tuple[str, Any]]:
        value = tensor if isinstance(tensor, np.ndarray) else tensor.read()
        return [(part.path, convert(part, value)) for part in parts]

    return [pool.submit(fill, tensors[name], parts) for name, parts in plan(tensors, rules, expected, source).items()]


def collect(futures: Iterable[Future]) -> Params:
    """The tree of what `submit` began to read."""
    return unflatten_dict(dict(pair for future in futures for pair in future.result()), sep="/")


def from_torch(*args, **kwargs) -> Params:
    """`submit`, and wait for it."""
    with readers() as pool:
        return collect(submit(pool, *args, **kwargs))


def shapes_of(init, *args) -> Params:
    """The parameter tree that a module's `init` would make, as shapes, without making it."""
    return jax.eval_shape(init, jax.random.key(0), *args)["params"]
