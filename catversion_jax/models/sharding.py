"""The device mesh, and the mesh axis that each array axis is split over: no other file decides that."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import Constraint, at_least, setting
from catversion_jax.utils.types import Params

AXES = ("concept", "data", "fsdp", "tensor")
"""The mesh axes. concept: independent concepts. data: a concept's batch. fsdp: the batch too, and the base model's
parameters, which are gathered before use. tensor: the base model's channels and heads; its devices share a batch."""

RULES = {
    "concept": "concept",  # the leading axis of state and data
    "batch": ("concept", "data", "fsdp"),  # concepts x batch, flattened: the UNet's batch
    "frozen": None,  # base model parameters that no rule splits: a copy on every device
}
"""logical axis -> mesh axes, None = not split."""

# Megatron-LM's pairs (Shoeybi et al. 2019, section 3). A column layer is split by its output channels, so each device
# computes its own heads (to_q, to_k, to_v) or hidden channels (fc1, conv1) without communication; time_emb_proj is
# added to conv1's output, so it is split alike. The row layer that follows is split by the same channels, now its
# inputs: each device holds a partial sum of the output, and one all-reduce joins the pair. A row layer's bias is added
# after that sum, so it stays whole. Kernels are [..., in, out]: -1 is the output axis, -2 the input axis.
COLUMN = r".*/(to_[qkv]|[qkv]_proj|fc1|conv1|time_emb_proj)/(kernel|bias)"
ROW = r".*/(to_out_0|out_proj|fc2|conv2)/kernel"
FROZEN = (
    (COLUMN, -1, "tensor"),
    (ROW, -2, "tensor"),
    (COLUMN, -2, "fsdp"),
    (r".*/(kernel|embedding)", -1, "fsdp"),
)
"""How the base model is split: (pattern of parameter paths, array axis, mesh axis). For each mesh axis, the first rule
that matches a path applies."""

Rules = Sequence[tuple[str, int, str]]


def are_rules(value: Rules) -> bool:
    """Whether a value has the form of FROZEN."""
    return all(len(rule) == 3 and isinstance(rule[1], int) and rule[2] in AXES for rule in value)


@dataclass(frozen=True)
class MeshConfig:
    """How many of a process's devices share a base model; `make_mesh` spreads concepts and batches over the rest."""

    fsdp: int = setting(1, "Number of devices that share a copy of the base model and split the batch.", at_least(1))
    tensor: int = setting(1, "Number of devices that split the base model's channels and heads.", at_least(1))
    rules: Rules = setting(
        FROZEN,
        "How the base model is split: (pattern of parameter paths, array axis, mesh axis) for each rule.",
        Constraint(are_rules, f"(pattern, array axis, one of {', '.join(AXES)}) for each rule"),
    )


def make_mesh(
    concepts: int, batch_size: int, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
    """Builds a mesh over as many of this process's devices as divide the work evenly.

    `fsdp` x `tensor` devices hold one copy of the base model. The concepts are split over the copies, then each
    concept's batch over the copies that are left. Raises UserError if the devices or the work cannot be divided so.
    """
    devices = jax.local_devices() if devices is None else devices
    copies, rest = divmod(len(devices), fsdp * tensor)
    if rest or not copies:
        raise UserError(
            f"config.mesh: fsdp x tensor = {fsdp} x {tensor}; expected a divisor of the {len(devices)} devices"
        )
    concept = math.gcd(concepts, copies)
    data = math.gcd(batch_size, copies // concept)
    share = concepts * batch_size // (concept * data)
    if share % fsdp:
        raise UserError(
            f"config.mesh.fsdp={fsdp}: splits the batch too; expected a divisor of {share}, which is what is left of "
            f"{concepts} x {batch_size}; choose another one, or another train.batch_size"
        )
    shape = (concept, data, fsdp, tensor)
    return Mesh(np.asarray(devices[: math.prod(shape)]).reshape(shape), AXES)


def sharding(mesh: Mesh, logical: str) -> NamedSharding:
    """The sharding that splits the first array axis as RULES say for the logical axis."""
    return NamedSharding(mesh, PartitionSpec(RULES[logical]))


def on_each_device(attend: Callable, heads: int) -> Callable:
    """Wraps attention on [B, positions, heads, channels] to run on each device's own images and, if they divide evenly,
    heads. Outside the mesh of a training step it is returned as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend
    share = PartitionSpec(RULES["batch"], None, "tensor" if heads % mesh.shape["tensor"] == 0 else None)
    # check_vma: a Pallas kernel does not declare over which mesh axes its output varies.
    return jax.shard_map(attend, in_specs=(share, share, share), out_specs=share, check_vma=False)


def param_shardings(params: Params, mesh: Mesh | None = None, rules: Rules = ()) -> Params:
    """The sharding of each parameter of a network (arrays or shapes): as `rules` split it over the mesh or, without a
    mesh, on the default device."""
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), params)
    specs = {path: spec(path, leaf.shape, mesh, rules) for path, leaf in flatten_dict(params, sep="/").items()}
    return unflatten_dict({path: NamedSharding(mesh, of_leaf) for path, of_leaf in specs.items()}, sep="/")


def spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The mesh axis of each array axis of a parameter; an array axis that does not divide evenly stays whole."""
    split: list[str | None] = [None] * len(shape)
    for axis in AXES:
        array_axis = next((n for pattern, n, name in rules if name == axis and re.fullmatch(pattern, path)), None)
        if array_axis is None or -array_axis > len(shape) or split[array_axis] is not None:
            continue
        if shape[array_axis] % mesh.shape[axis] == 0:
            split[array_axis] = axis
    return PartitionSpec(*split)
