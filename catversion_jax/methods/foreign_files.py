"""What a file is that is no concept: embeddings, adapters and models of other programs, told by their tensors."""

import re
from collections.abc import Iterable
from pathlib import Path

from catversion_jax.utils.files import open_regular

TENSORS = (
    (r"emb_params|<.*>|string_to_param\..*", "a Textual Inversion embedding"),
    (r"clip_[lgh]", "a Textual Inversion embedding of SDXL"),
    (r".*\.(hada_|lokr_|oft_).*", "a LyCORIS adapter"),
    (r"lora_(unet|te\d?)_.*|.*(\.|_)lora(\.|_|[AB]\b).*|.*lora_(up|down).*", "a LoRA"),
    (r"(control_model|controlnet|input_hint_block).*", "a ControlNet"),
    (
        r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*",
        "a whole model, for --model",
    ),
    (r"(down_blocks|up_blocks|mid_block|conv_in|time_embedding)\..*", "a UNet of diffusers"),
    (r"(encoder|decoder)\.(conv_in|down_blocks|up_blocks|mid_block)\..*", "a VAE of diffusers"),
    (r"(text_model|vision_model)\..*", "a CLIP of transformers"),
)
"""A pattern of a tensor's name -> what a file with such a tensor is. The first one that matches counts."""

HEADS = (
    (b"PK", "a PyTorch file (.pt, .bin, .ckpt); `catversion convert` reads those of the paper's authors"),
    (b"\x80\x02", "a pickle, which is never opened"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a photo"),
    (b"{", "a text file"),
)
"""The first bytes of a file -> what it is."""


def kind_of_tensors(names: Iterable[str]) -> str | None:
    """Names what holds tensors of these names, None if that is unknown or a concept."""
    listed_names = list(names)
    for pattern, kind in TENSORS:
        if any(re.fullmatch(pattern, name) for name in listed_names):
            return kind
    return None


def kind_of_file(path: Path) -> str | None:
    """Names what a file that is not safetensors is by its first bytes, None if they tell nothing."""
    with open_regular(path) as file:
        head = file.read(8)
    return next((kind for start, kind in HEADS if head.startswith(start)), None)
