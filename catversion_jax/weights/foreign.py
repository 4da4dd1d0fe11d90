"""Names what a file or a folder is that was given as a base model and is none."""

import contextlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import UserError, one_line
from catversion_jax.utils.records import read_record

ADAPTERS = (
    (r"emb_params|<.*>|string_to_param(\..*)?", "a Textual Inversion embedding"),
    (r"clip_[lgh]", "a Textual Inversion embedding of SDXL"),
    (r".*\.(hada_|lokr_|oft_).*", "a LyCORIS adapter"),
    (r"lora_(unet|te\d?)_.*|.*(\.|_)lora(\.|_|[AB]\b).*|.*lora_(up|down).*|.*\.dora_scale", "a LoRA"),
    (r"(control_model|controlnet|input_hint_block).*", "a ControlNet"),
    (r"(ip_adapter|image_proj)\..*", "an IP-Adapter"),
    (r".*custom_diffusion.*", "Custom Diffusion's weights of diffusers"),
    (r".*motion_modules?\..*", "a motion module of AnimateDiff"),
    (r"adapter\.(body|conv_in)\..*|body\.\d+\.block.*", "a T2I-Adapter"),
    (r"\d+\.\d+\.linear\d?\..*", "a hypernetwork"),
)
"""A pattern of a tensor's name -> what a file with such a tensor is. The first one that matches counts."""

PARTS = (
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?double_blocks\..*", "Flux"),
    (r"(first_stage_model\.)?(encoder|decoder)\.(?!layers\.).*", "an autoencoder alone"),
    (r"(model\.diffusion_model\.)?input_blocks\..*", "a UNet alone"),
    (r"(down|up)_blocks\..*", "one part of a model in diffusers layout; give the folder of all parts"),
    (r"(text_model|embeddings|transformer\.resblocks|cond_stage_model|conditioner)\..*", "a text encoder alone"),
    (r"prefix", "a trained concept; give the base model that it was trained with"),
)
"""The same of models that are not ours, and of parts of one."""

FOREIGN_FILES = {
    "adapter_config.json": "a LoRA, which changes a base model",
    "pytorch_lora_weights.safetensors": "a LoRA, which changes a base model",
    "pytorch_lora_weights.bin": "a LoRA, which changes a base model",
    "learned_embeds.safetensors": "a Textual Inversion embedding",
    "learned_embeds.bin": "a Textual Inversion embedding",
    "concept.safetensors": "a trained concept",
}
"""File in a folder -> what the folder is, if it is no base model."""


def kind_of_names(names: Collection[str], patterns: Iterable[tuple[str, str]]) -> str | None:
    """Names what holds tensors of these names: the first pattern that one of them matches; None if that is unknown."""
    for pattern, kind in patterns:
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    return None


def what_file(names: Collection[str]) -> str:
    """Says what a file is that is no whole base model; "" if that cannot be told."""
    return kind_of_names(names, (*ADAPTERS, *PARTS)) or ""


def what_folder(path: Path) -> str:
    """Says what a folder is that is no base model, if it can be told; else ""."""
    for name, what in FOREIGN_FILES.items():
        if (path / name).is_file():
            return f"this is {what}: "
    for name in ("model_index.json", "config.json"):
        with contextlib.suppress(UserError):
            config = read_record(path / name, dict[str, Any])
            kind = config.get("_class_name") or config.get("architectures") or config.get("model_type")
            return f"its {name} says {one_line(str(kind), 100)}: " if kind else ""
    return ""
