"""Names what a file or a folder is that was given as a base model and is none."""

import contextlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import UserError, one_line
from catversion_jax.utils.records import read_record

FOREIGN = {
    r"(^|[._])(lora|lycoris|oft|hada|lokr)_|\.lora([._](A|B|up|down|mid)|_linear_layer)\b|\.dora_scale$": (
        "a LoRA, which changes a base model; give the base model"
    ),
    r"^(string_to_param|emb_params|clip_[lg]|<[^<>]*>)$": "a Textual Inversion embedding; give a base model",
    r"^control_model\.|^controlnet_|^input_hint_block\.": "a ControlNet; give a base model",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter; give a base model",
    r"^(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3",
    r"^(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"^(first_stage_model\.)?(encoder|decoder)\.": "an autoencoder alone",
    r"^(model\.diffusion_model\.)?input_blocks\.": "a UNet alone",
    r"^(down|up)_blocks\.": "one part of a model in diffusers layout; give the folder of all parts",
    r"^(text_model|transformer\.resblocks|cond_stage_model|conditioner)\.": "a text encoder alone",
    r"^prefix$": "a trained concept; give the base model that it was trained with",
}
"""Pattern in a tensor's name -> what kind of file has it, if it is no whole base model."""

FOREIGN_FILES = {
    "adapter_config.json": "a LoRA, which changes a base model",
    "pytorch_lora_weights.safetensors": "a LoRA, which changes a base model",
    "pytorch_lora_weights.bin": "a LoRA, which changes a base model",
    "learned_embeds.safetensors": "a Textual Inversion embedding",
    "learned_embeds.bin": "a Textual Inversion embedding",
    "concept.safetensors": "a trained concept",
}
"""File in a folder -> what the folder is, if it is no base model."""


def what_file(names: Collection[str]) -> str:
    """Says what kind of file has tensors of these names; "" if that cannot be told."""
    return next((what for pattern, what in FOREIGN.items() if any(re.search(pattern, name) for name in names)), "")


def what_folder(path: Path) -> str:
    """Says what a folder is that is no base model, if it can be told; else ""."""
    for name, what in FOREIGN_FILES.items():
        if (path / name).is_file():
            return f"this is {what}, not a base model: "
    for name in ("model_index.json", "config.json"):
        with contextlib.suppress(UserError):
            config = read_record(path / name, dict[str, Any])
            kind = config.get("_class_name") or config.get("architectures") or config.get("model_type")
            return f"its {name} says {one_line(str(kind), 100)}: " if kind else ""
    return ""
