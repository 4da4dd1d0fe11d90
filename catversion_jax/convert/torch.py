"""Apply a conversion table to the tensors of a PyTorch checkpoint."""

import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.convert.rules import LEAVES, Rule
from catversion_jax.errors import UserError
from catversion_jax.types import Params


def compile_rules(rules: Iterable[Rule]) -> list[tuple[re.Pattern, str | None, object]]:
    """One (pattern of a tensor name, target path, layout op) per leaf of every rule."""
    compiled = []
    for rule in rules:
        for torch_leaf, (flax_leaf, op) in LEAVES[rule.kind].items():
            name = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(f"{rule.torch}.{torch_leaf}".removesuffix(".")))
            target = rule.flax and f"{rule.flax}/{flax_leaf}".removesuffix("/")
            compiled.append((re.compile(name), target, op))
    return compiled


def from_torch(tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], expected: Params, source: str) -> Params:
    """The Flax parameters `expected` (a tree of shapes) from PyTorch's `tensors`; dtypes are kept.

    Raises UserError, naming `source`, that lists every tensor that no rule or more than one rule matches, two tensors
    with one target, targets that the model does not have, parameters that nothing filled, and wrong shapes.
    """
    compiled = compile_rules(rules)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(expected, sep="/").items()}
    filled: dict[str, np.ndarray] = {}
    problems: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        matches = [(m, target, op) for pattern, target, op in compiled if (m := pattern.fullmatch(name))]
        if len(matches) != 1:
            problems.setdefault("no rule for" if not matches else "several rules for", []).append(name)
            continue
        match, target, op = matches[0]
        if target is None:
            continue
        path = target.format(**match.groupdict())
        if path not in shapes:
            problems.setdefault("not part of this model", []).append(name)
        elif path in filled:
            problems.setdefault("given twice", []).append(f"{path} (again as {name})")
        elif (value := op(tensor)).shape != shapes[path]:
            problems.setdefault("wrong shape", []).append(f"{name} {tensor.shape}, expected {shapes[path]} as {path}")
        else:
            filled[path] = value
    missing = shapes.keys() - filled.keys()
    if missing and "wrong shape" not in problems:
        problems["missing"] = sorted(missing)
    if problems:
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items())
        raise UserError(f"{source}: does not fit the model its config.json describes: {listed}")
    return unflatten_dict(filled, sep="/")


def shapes_of(init, *args) -> Params:
    """The parameter tree that a module's `init` would make, as shapes, without making it."""
    return jax.eval_shape(init, jax.random.key(0), *args)["params"]
