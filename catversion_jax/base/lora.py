"""LoRA files of other programs, merged into a base model: W + scale (alpha / rank) up down.

The names of kohya's sd-scripts (`lora_unet_down_blocks_0_...`, `lora_te1_...`, also with the original layout's
`input_blocks_4_1_...`) and of diffusers (`unet.down_blocks.0...lora_A.weight`, `...lora.down.weight`,
`...processor.to_q_lora.down.weight`, `...lora_linear_layer.down.weight`) are known. Every tensor of a file must belong
to a layer of the model; nothing is left out.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.utils import records, tree
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.types import Params
from catversion_jax.weights import ldm, rules, safetensors, torch_zip
from catversion_jax.weights.conversion import layout, with_numbers
from catversion_jax.weights.rules import LEAVES, Rule
from catversion_jax.weights.tensor import Tensor

MOST_SCALE = 10.0
ADAPTER = "lora_adapter_metadata"
"""The metadata with the settings of PEFT that diffusers writes."""
NOT_KNOWN = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
PARTS = {
    "down": r"(\.lora_down|\.lora_A|\.lora_A\.default|[._]lora\.down|\.lora_linear_layer\.down)\.weight",
    "up": r"(\.lora_up|\.lora_B|\.lora_B\.default|[._]lora\.up|\.lora_linear_layer\.up)\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(\.lora(_linear_layer)?|_lora)?\.alpha",
}
"""What a tensor is -> the end of its name, behind the layer's."""
COMPONENTS = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text"),
    ("lora_te2_", "text_2"),
    ("lora_te_", "text"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_2"),
    ("text_encoder.", "text"),
    ("", "unet"),  # the attention processors of older diffusers
)
"""The beginning of a tensor's name -> the network that it changes."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file: the matrices of each layer, by the layer's name in the file."""

    path: Path
    digest: str
    alphas: Mapping[str, float]  # component -> the alpha of the layers that have none of their own
    layers: Mapping[str, Mapping[str, Tensor]]  # layer -> down, up and perhaps mid and alpha


def read_lora(path: Path) -> Lora:
    """Reads a LoRA's names, and its digest. Raises UserError for a file that is none, and for kinds not known."""
    is_torch = path.suffix.lower() in (".pt", ".bin", ".ckpt")
    tensors: Mapping[str, Tensor] = torch_zip.open_checkpoint(path) if is_torch else safetensors.open_safetensors(path)
    alphas = {} if is_torch else alphas_of(path, safetensors.read_metadata(path))
    if peft := [name for name in tensors if name.startswith("base_model.")]:
        raise UserError(
            f"{path}: {peft[0]} of PEFT, whose scale is in another file; expected a LoRA that diffusers saved, by "
            "save_lora_weights"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        found = [(name[: match.start()], part) for part, end in PARTS.items() if (match := re.search(f"{end}$", name))]
        if not found:
            unknown.append(name)
            continue
        ((layer, part),) = found
        if part in layers.get(layer, {}):
            raise UserError(f"{path}: {layer}: given by two names; expected one of each matrix")
        layers.setdefault(layer, {})[part] = tensor
    if unknown or not layers:
        raise UserError(
            f"{path}: tensors {listed(sorted(unknown)) or 'none'}; expected a LoRA by the names of kohya or diffusers "
            "(other kinds of adapters, such as LyCORIS and DoRA, are not known)"
        )
    if odd := [layer for layer, parts in layers.items() if not {"down", "up"} <= parts.keys()]:
        raise UserError(f"{path}: {listed(odd)}: without both of its matrices; download the file again")
    digests = {name: tree.digest(tensor.read()) for name, tensor in tensors.items()}
    return Lora(path, tree.fingerprint(digests | {"": repr(sorted(alphas.items())).encode()}), alphas, layers)


def alphas_of(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """Returns the alpha of each network that diffusers writes into a file's metadata.

    Raises UserError for settings of PEFT by which layers would differ, or be scaled otherwise.
    """
    if ADAPTER not in metadata:
        return {}
    said = records.decode(metadata[ADAPTER], dict[str, Any], f"{path}: {ADAPTER}", "download the file again")
    if odd := [key for key, value in said.items() if key.rpartition(".")[2] in NOT_KNOWN and value]:
        raise UserError(f"{path}: {ADAPTER} has {listed(odd)}, which are not known; expected a plain LoRA")
    components = {start.rstrip("."): name for start, name in COMPONENTS if start.endswith(".")}
    alphas = {name: said.get(f"{start}.lora_alpha") for start, name in components.items()}
    return {name: float(alpha) for name, alpha in alphas.items() if isinstance(alpha, int | float)}


@dataclass(frozen=True)
class Place:
    """A layer of a network that a LoRA may change."""

    component: str
    path: str  # of its kernel
    kind: str  # of rules.LEAVES


def merge_lora(pipeline: BasePipeline, lora: Lora, scale: float) -> BasePipeline:
    """Returns the pipeline with a LoRA in its text encoders and its UNet.

    Its fingerprint stays that of the base model: a concept that was learned there is used on top of the LoRA. Raises
    UserError for a file of another model.
    """
    places = {key: place for name in networks_of(pipeline) for key, place in places_in(pipeline, name)}
    found = {layer: places.get(key_of(layer)) for layer in lora.layers}
    if lost := [layer for layer, place in found.items() if place is None]:
        raise UserError(
            f"{lora.path}: {len(lost)} of {len(found)} layers are not in this base model ({listed(lost)}); "
            "expected a LoRA of the same kind of Stable Diffusion"
        )
    flat = {name: flatten_dict(params, sep="/") for name, params in networks_of(pipeline).items()}
    for layer, place in found.items():
        assert place is not None
        kernel = flat[place.component][place.path]
        change = scale * change_of(lora, layer, place, kernel.shape)
        flat[place.component][place.path] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    changed = {name: unflatten_dict(params, sep="/") for name, params in flat.items()}
    text = tuple(changed[name] for name in changed if name != "unet")
    return replace(pipeline, params=pipeline.params | {"text": text, "unet": changed["unet"]})


def networks_of(pipeline: BasePipeline) -> dict[str, Params]:
    texts = zip(("text", "text_2"), pipeline.params["text"], strict=False)
    return dict(texts) | {"unet": pipeline.params["unet"]}


def places_in(pipeline: BasePipeline, component: str) -> Iterator[tuple[tuple[str, str], Place]]:
    """Yields the layers of a network by each of their names, as `key_of` spells them."""
    kernels = [path for path in flatten_dict(networks_of(pipeline)[component], sep="/") if path.endswith("/kernel")]
    for rule in rules_of(pipeline, component):
        if rule.flax is None or "weight" not in LEAVES[rule.kind]:
            continue
        pattern = with_numbers(f"{rule.flax}/kernel")
        for path in kernels:
            if match := pattern.fullmatch(path):
                name = rule.torch.format(**match.groupdict())
                yield (component, flattened(name)), Place(component, path, rule.kind)


def rules_of(pipeline: BasePipeline, component: str) -> Sequence[Rule]:
    """The names of a network's layers: diffusers' and, of the UNet, the original layout's."""
    if component != "unet":
        return [*rules.clip_text("text_model."), rules.TEXT_PROJECTION]
    config = pipeline.networks.unet.config
    layers = {"block_out_channels": config.block_out_channels, "layers_per_block": config.layers_per_block}
    return [*rules.UNET, *ldm.unet_rules(layers)]


def key_of(layer: str) -> tuple[str, str]:
    """Returns the network of a layer's name in a file, and the name as `flattened` spells it."""
    start, component = next((start, name) for start, name in COMPONENTS if layer.startswith(start))
    name = re.sub(r"\.processor\.to_out$", ".to_out.0", layer.removeprefix(start)).replace(".processor.", ".")
    return component, flattened(name)


def flattened(name: str) -> str:
    return name.replace(".", "_")


def change_of(lora: Lora, layer: str, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """Returns what a layer's matrices add to its kernel, at scale 1. Raises UserError if they do not fit it."""
    tensors = lora.layers[layer]
    ((_, op),) = LEAVES[place.kind]["weight"]
    product = product_shape(tensors, len(shape))
    # Before anything is multiplied: two thin matrices of a small file could have a product that fills the memory.
    if product is None or layout(op, product) != shape:
        sizes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items() if part != "alpha")
        raise UserError(
            f"{lora.path}: {layer}: {sizes}; expected a change of {list(shape)}: a LoRA of another base model"
        )
    parts = {part: np.asarray(tensor.read(), np.float32) for part, tensor in tensors.items()}
    if not all(np.isfinite(values).all() for values in parts.values()):
        raise UserError(f"{lora.path}: {layer} holds NaN or infinity; download the file again")
    up, down, rank = parts["up"], parts["down"], len(parts["down"])
    if "mid" in parts:  # a convolution in three parts, as LoCon has it
        outer, inner = (matrix.reshape(matrix.shape[:2]) for matrix in (up, down))
        change = np.einsum("or,rskl,si->oikl", outer, parts["mid"], inner, optimize=True)
    else:
        change = np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
    alpha = float(parts["alpha"].reshape(-1)[0]) if "alpha" in parts else lora.alphas.get(place.component, rank)
    return alpha / rank * op(change.reshape(product))


def product_shape(tensors: Mapping[str, Tensor], dimensions: int) -> tuple[int, ...] | None:
    """Returns the shape of a layer's product as a weight of so many dimensions; None if its matrices do not fit."""
    down, up, mid = (tuple(tensors[part].shape) if part in tensors else None for part in ("down", "up", "mid"))
    if down is None or up is None or min(len(down), len(up)) < 2 or up[1] != down[0] or 0 in (*down, *up):
        return None
    if math.prod(up[2:]) != 1 or ("alpha" in tensors and math.prod(tensors["alpha"].shape) != 1):
        return None
    if mid is not None and (len(mid) != 4 or mid[:2] != (down[0], down[0]) or math.prod(down[2:]) != 1):
        return None
    sides = down[2:] if mid is None else mid[2:]
    # A matrix of a file may be a 1 x 1 convolution of the model, and the other way about.
    if len(sides) != dimensions - 2 and math.prod(sides) == 1:
        sides = (1,) * (dimensions - 2)
    return (up[0], down[1], *sides)
