"""Apply a conversion table to the tensors of a PyTorch checkpoint."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.convert.rules import LEAVES, Rule, same
from catversion_jax.convert.tensor import Tensor
from catversion_jax.errors import UserError
from catversion_jax.types import Params


class Part(NamedTuple):
    """A parameter, and what makes it of its tensor."""

    path: str
    op: Callable[[np.ndarray], np.ndarray]


def compile_rules(rules: Iterable[Rule]) -> list[tuple[re.Pattern, tuple[tuple[str | None, Callable], ...]]]:
    """A pattern of tensor names for each tensor of every rule, and (target path, layout op) of what it fills."""
    compiled = []
    for rule in rules:
        for torch_leaf, parts in LEAVES[rule.kind].items():
            name = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(f"{rule.torch}.{torch_leaf}".removesuffix(".")))
            targets = tuple((rule.flax and f"{rule.flax}/{leaf}".removesuffix("/"), op) for leaf, op in parts)
            compiled.append((re.compile(name), targets))
    return compiled


def plan(
    tensors: Mapping[str, Tensor | np.ndarray], rules: Iterable[Rule] | None, expected: Params, source: str
) -> dict[str, list[Part]]:
    """Which parameters each tensor fills; no tensor is read. Without rules, names and layouts are Flax's already.

    Raises UserError, naming `source`, that lists every tensor that no rule or more than one rule matches, two tensors
    with one target, targets that the model does not have, parameters that nothing filled, and wrong shapes.
    """
    compiled = compile_rules(rules or [])
    shapes = {path: leaf.shape for path, leaf in flatten_dict(expected, sep="/").items()}
    planned: dict[str, list[Part]] = {}
    filled: set[str] = set()
    problems: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if rules is None:
            matches = [(re.fullmatch(".*", name), ((name, same),))]
        else:
            matches = [(m, targets) for pattern, targets in compiled if (m := pattern.fullmatch(name))]
        if len(matches) != 1:
            problems.setdefault("no rule for" if not matches else "several rules for", []).append(name)
            continue
        match, targets = matches[0]
        for target, op in targets:
            if target is None:
                continue
            path = target.format(**match.groupdict())
            if path not in shapes:
                problems.setdefault("not part of this model", []).append(name)
            elif path in filled:
                problems.setdefault("given twice", []).append(f"{path} (again as {name})")
            elif layout(op, tensor.shape) != shapes[path]:
                found = f"{name} {tuple(tensor.shape)}, expected {shapes[path]} as {path}"
                problems.setdefault("wrong shape", []).append(found)
            else:
                filled.add(path)
                planned.setdefault(name, []).append(Part(path, op))
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


def from_torch(
    tensors: Mapping[str, Tensor | np.ndarray],
    rules: Iterable[Rule] | None,
    expected: Params,
    source: str,
    place: Callable[[str, np.ndarray], Any] = lambda path, value: value,
) -> Params:
    """The Flax parameters `expected` (a tree of shapes) from PyTorch's `tensors`, one in memory at a time.

    `place` takes each parameter's path and value, in the file's dtype, to what the tree shall hold: an array on its
    devices. Raises UserError as `plan` does, before any tensor is read.
    """
    filled = {}
    for name, parts in plan(tensors, rules, expected, source).items():
        tensor = tensors[name]
        value = tensor if isinstance(tensor, np.ndarray) else tensor.read()
        for part in parts:
            filled[part.path] = place(part.path, part.op(value))
    return unflatten_dict(filled, sep="/")


def shapes_of(init, *args) -> Params:
    """The parameter tree that a module's `init` would make, as shapes, without making it."""
    return jax.eval_shape(init, jax.random.key(0), *args)["params"]
