"""What a file is that is no concept: embeddings, adapters and models of other programs, told by their tensors."""

from collections.abc import Iterable

from catversion_jax.utils.files import open_regular
from catversion_jax.utils.paths import AnyPath
from catversion_jax.weights.foreign import ADAPTERS, kind_of_names

TENSORS = (
    *ADAPTERS,
    (
        r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*",
        "a whole model, for --model",
    ),
    (r"(down_blocks|up_blocks|mid_block|conv_in|time_embedding)\..*", "a UNet of diffusers"),
    (r"(encoder|decoder)\.(conv_in|down_blocks|up_blocks|mid_block)\..*", "a VAE of diffusers"),
    (r"(text_model|vision_model)\..*", "a CLIP of transformers"),
)
"""As in weights/foreign.py; a whole model is no concept either."""

TORCH = b"PK"
HEADS = (
    (TORCH, "a PyTorch file (.pt, .bin, .ckpt); `catversion convert` reads those of the paper's authors"),
    (b"\x80\x02", "a pickle, which is never opened"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a photo"),
    (b"{", "a text file"),
)
"""The first bytes of a file -> what it is."""


def kind_of_tensors(names: Iterable[str]) -> str | None:
    """Names what holds tensors of these names, None if that is unknown or a concept."""
    return kind_of_names(list(names), TENSORS)


def kind_of_file(path: AnyPath) -> str | None:
    """Names what a file that is not safetensors is by its first bytes, None if they tell nothing."""
    head = head_of(path)
    return next((kind for start, kind in HEADS if head.startswith(start)), None)


def is_torch(path: AnyPath) -> bool:
    """Whether a file begins as those of torch.save do."""
    return head_of(path).startswith(TORCH)


def head_of(path: AnyPath) -> bytes:
    with open_regular(path) as file:
        return file.read(8)
