"""LoRA files of other programs, merged into a base model: W + scale (alpha / rank) up down.

The names of kohya's sd-scripts (`lora_unet_down_blocks_0_...`, `lora_te1_...`, also with the original layout's
`input_blocks_4_1_...`) and of diffusers (`unet.down_blocks.0...lora_A.weight`, `...lora.down.weight`,
`...processor.to_q_lora.down.weight`, `...lora_linear_layer.down.weight`) are known. Every tensor of a file must belong
to a layer of the model; nothing is left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.utils import tree
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.types import Params
from catversion_jax.weights import ldm, rules, safetensors, torch_zip
from catversion_jax.weights.rules import LEAVES, Rule
from catversion_jax.weights.tensor import Tensor

MOST_SCALE = 10.0
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
    layers: Mapping[str, Mapping[str, Tensor]]  # layer -> down, up and perhaps mid and alpha


def read_lora(path: Path) -> Lora:
    """Reads a LoRA's names, and its digest. Raises UserError for a file that is none, and for kinds not known."""
    is_torch = path.suffix.lower() in (".pt", ".bin", ".ckpt")
    tensors: Mapping[str, Tensor] = torch_zip.open_checkpoint(path) if is_torch else safetensors.open_safetensors(path)
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        found = [(name[: match.start()], part) for part, end in PARTS.items() if (match := re.search(f"{end}$", name))]
        if not found:
            unknown.append(name)
            continue
        ((layer, part),) = found
        layers.setdefault(layer, {})[part] = tensor
    if unknown or not layers:
        raise UserError(
            f"{path}: tensors {listed(sorted(unknown)) or 'none'}; expected a LoRA by the names of kohya or diffusers "
            "(other kinds of adapters, such as LyCORIS and DoRA, are not known)"
        )
    if odd := [layer for layer, parts in layers.items() if not {"down", "up"} <= parts.keys()]:
        raise UserError(f"{path}: {listed(odd)}: without both of its matrices; download the file again")
    return Lora(path, tree.fingerprint({name: tree.digest(tensor.read()) for name, tensor in tensors.items()}), layers)


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
        pattern = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(f"{rule.flax}/kernel")))
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
    layer = layer.removeprefix("base_model.model.")
    start, component = next((start, name) for start, name in COMPONENTS if layer.startswith(start))
    name = re.sub(r"\.processor\.to_out$", ".to_out.0", layer.removeprefix(start)).replace(".processor.", ".")
    return component, flattened(name)


def flattened(name: str) -> str:
    return name.replace(".", "_")


def change_of(lora: Lora, layer: str, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """Returns what a layer's matrices add to its kernel, at scale 1. Raises UserError if they do not fit it."""
    parts = {part: np.asarray(tensor.read(), np.float32) for part, tensor in lora.layers[layer].items()}
    down, up = parts["down"], parts["up"]
    rank = down.shape[0] if down.ndim else 0
    alpha = float(parts["alpha"].reshape(-1)[0]) if parts.get("alpha", np.zeros(0)).size else float(rank)
    if not all(np.isfinite(values).all() for values in parts.values()):
        raise UserError(f"{lora.path}: {layer} holds NaN or infinity; download the file again")
    try:
        if "mid" in parts:  # a convolution in three parts, as LoCon has it
            product = np.einsum(
                "or,rskl,si->oikl", up.reshape(up.shape[:2]), parts["mid"], down.reshape(down.shape[:2])
            )
        else:
            product = np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
        # A matrix of a file may be a 1 x 1 convolution of the model, and the other way about.
        sides = (len(shape) - 2) * (1,)
        if product.ndim != len(shape) and set(product.shape[2:]) <= {1}:
            product = product.reshape(*product.shape[:2], *sides)
        ((_, op),) = LEAVES[place.kind]["weight"]
        change = op(product)
    except ValueError:
        change = np.zeros(0)
    if change.shape != shape or not rank:
        sizes = ", ".join(f"{part} {list(values.shape)}" for part, values in parts.items() if values.ndim)
        raise UserError(
            f"{lora.path}: {layer}: {sizes}; expected a change of {list(shape)}: a LoRA of another base model"
        )
    return alpha / rank * change
