"""Applies a conversion table (rules.py) to the tensors of a PyTorch checkpoint."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.types import Params
from catversion_jax.weights.rules import LEAVES, Rule, same
from catversion_jax.weights.tensor import Tensor

# Threads are enough: numpy releases the GIL while it reads, casts and copies.
THREADS = 4
"""Tensors read and laid out at a time: enough to keep up with a disk, few enough to need little memory."""


class Target(NamedTuple):
    """A parameter's path, and the layout op that makes it from its tensor."""

    path: str
    op: Callable[[np.ndarray], np.ndarray]
    optional: bool = False  # the model need not have the parameter


def compile_rules(rules: Iterable[Rule]) -> list[tuple[re.Pattern, list[Target]]]:
    """Returns a name pattern for each tensor of every rule, and the parameters it fills, with {i} in their paths."""
    compiled = []
    for rule in rules:
        for torch_leaf, leaves in LEAVES[rule.kind].items():
            name = with_numbers(f"{rule.torch}.{torch_leaf}".removesuffix("."))
            paths = [(f"{rule.flax}/{leaf}".removesuffix("/"), op) for leaf, op in leaves if rule.flax is not None]
            compiled.append((name, [Target(*part, rule.optional) for part in paths]))
    return compiled


def with_numbers(name: str) -> re.Pattern:
    """Returns the pattern of a rule's name, in which {i} stands for a number."""
    # re.escape has made \{i\} of {i}.
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(name)))


def matches(compiled: list[tuple[re.Pattern, list[Target]]], name: str) -> list[list[Target]]:
    """Returns the parameters that a tensor fills, for each rule that matches its name."""
    return [
        [part._replace(path=part.path.format(**match.groupdict())) for part in parts]
        for pattern, parts in compiled
        if (match := pattern.fullmatch(name))
    ]


def plan_conversion(
    tensors: Mapping[str, Tensor | np.ndarray], rules: Iterable[Rule] | None, expected: Params, source: str
) -> dict[str, list[Target]]:
    """Returns which parameters each tensor fills, without reading a tensor. If `rules` is None, names and layouts are
    Flax's already.

    Raises UserError, naming `source`, that lists tensors that no rule or several rules match, parameters that are
    filled twice, that the model does not have or that nothing fills, and wrong shapes; the first of each, and how many.
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
            if path not in shapes and part.optional:
                continue
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
        found_wrong = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items())
        raise UserError(f"{source}: does not fit the model its config.json describes: {found_wrong}")
    return planned


def layout(op: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape that a layout op gives, or None if it does not take a tensor of that shape."""
    # The op runs on a broadcast zero, one number with strides of 0: any shape costs no memory, every tensor is checked
    # before one is read, and no second description of the op is needed.
    try:
        return op(np.broadcast_to(np.float16(0), shape)).shape
    except (ValueError, IndexError):
        return None


@contextlib.contextmanager
def readers() -> Iterator[Executor]:
    """Provides threads that read tensors; after an error (a damaged file, Ctrl-C) the remaining ones are not read."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


Convert = Callable[[Target, np.ndarray], Any]
"""Turns a tensor, as the file has it, into what the tree holds for one target, such as an array on the device."""


def submit(
    pool: Executor,
    tensors: Mapping[str, Tensor | np.ndarray],
    rules: Iterable[Rule] | None,
    expected: Params,
    source: str,
    convert: Convert = lambda part, tensor: part.op(tensor),
) -> list[Future]:
    """Starts to read the Flax parameters `expected` (a tree of shapes) from PyTorch's `tensors`, a few at a time.

    `convert` is called in several threads. Raises UserError as `plan_conversion` does, before any tensor is read; the
    futures raise it for a tensor with NaN.
    """

    def fill(name: str, parts: list[Target]) -> list[tuple[str, Any]]:
        tensor = tensors[name]
        value = tensor if isinstance(tensor, np.ndarray) else tensor.read()
        if not is_finite(value):
            raise UserError(
                f"{source}: {name} holds NaN, or numbers too large for float32; copy or download the weights again"
            )
        return [(part.path, convert(part, value)) for part in parts]

    return [pool.submit(fill, name, parts) for name, parts in plan_conversion(tensors, rules, expected, source).items()]


def is_finite(numbers: np.ndarray) -> bool:
    """Whether all numbers are finite, also as float32."""
    if numbers.dtype.kind in "iub" or not numbers.size:
        return True
    if numbers.itemsize == 2:
        # The bits without the sign, as integers: numpy has no fast operation on half precision. All bits of the
        # exponent are set in infinity and NaN alone.
        exponent = 0x7C00 if numbers.dtype == np.float16 else 0x7F80
        bits = numbers.view(np.int16)
        return bool(bits.max() < exponent and bits.view(np.uint16).max() < 0x8000 + exponent)
    # NaN and infinity stay in the sum, or else the sum of large numbers overflows: then each is looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(numbers.sum(dtype=np.float32)) or np.isfinite(numbers.astype(np.float32)).all())


def collect(futures: Iterable[Future]) -> Params:
    """Waits for what `submit` started, and returns it as a tree."""
    return unflatten_dict(dict(pair for future in futures for pair in future.result()), sep="/")


def from_torch(*args, **kwargs) -> Params:
    """Runs `submit` and waits for its parameters."""
    with readers() as pool:
        return collect(submit(pool, *args, **kwargs))


def shapes_of(init, *args) -> Params:
    """Returns the shapes of the parameters that a module's `init` would create, without creating them."""
    return jax.eval_shape(init, jax.random.key(0), *args)["params"]
