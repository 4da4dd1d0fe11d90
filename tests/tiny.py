"""A tiny random Stable Diffusion in diffusers layout: the real format, so small that a command takes seconds."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from catversion_jax import pipeline, source
from catversion_jax.convert.rules import LEAVES, Rule

CHANGES = {
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4},
    "unet": {
        "block_out_channels": [32, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "sample_size": 8,
    },
    "vae": {
        "block_out_channels": [16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "sample_size": 16,
    },
}
XL_CHANGES = CHANGES | {
    "text_encoder": CHANGES["text_encoder"] | {"architectures": ["CLIPTextModel"]},
    "text_encoder_2": CHANGES["text_encoder"] | {"hidden_size": 48, "num_attention_heads": 3, "projection_dim": 24},
    "unet": CHANGES["unet"]
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 80,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}
INVERSE = {
    "kernel": lambda w: w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T,
    "scale": lambda w: w,
    "bias": lambda w: w,
    "embedding": lambda w: w,
    "class_embedding": lambda w: w,
}


def to_torch(params: dict, rules: list[Rule]) -> dict[str, np.ndarray]:
    """PyTorch's tensors of a Flax tree: the conversion backwards, written apart from it."""
    names = {}
    for rule in rules:
        for torch_leaf, ((flax_leaf, _),) in LEAVES[rule.kind].items():
            if rule.flax is not None:
                path = f"{rule.flax}/{flax_leaf}".removesuffix("/")
                names[re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(path))] = (
                    f"{rule.torch}.{torch_leaf}".removesuffix(".")
                )
    tensors = {}
    for path, value in flatten_dict(params, sep="/").items():
        name, groups = next(
            (name, match.groupdict()) for pattern, name in names.items() if (match := re.fullmatch(pattern, path))
        )
        leaf = path.rsplit("/", 1)[-1]
        tensors[name.format(**groups)] = np.ascontiguousarray(INVERSE[leaf](np.asarray(value)))
    return tensors


def random_params(shapes: dict, rng: np.random.Generator) -> dict:
    """Weights that keep the activations' size; scales around 1 and biases around 0."""

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        spread = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" and leaf.ndim == 2 else 0.05
        return (centre + spread * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def write(folder: Path, seed: int = 0, dtype=np.float16, changes: dict = CHANGES) -> Path:
    """Write the model to `folder` and return it. With XL_CHANGES it is a tiny SDXL."""
    for part in ("tokenizer", "scheduler", "tokenizer_2"):
        shutil.copytree(pipeline.MINI / part.removesuffix("_2"), folder / part, dirs_exist_ok=True)
    for name, part in source.FOLDERS.items():
        if part not in changes:
            continue
        component = pipeline.COMPONENTS[name]
        like = pipeline.MINI / part.removesuffix("_2") / "config.json"
        config = json.loads(like.read_text()) | changes[part]
        module = component.make(config, np.float32)
        params = random_params(pipeline.abstract(name, module), np.random.default_rng(seed))
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        tensors = {key: value.astype(dtype) for key, value in to_torch(params, source.RULES[name]).items()}
        save_file(tensors, folder / part / f"{stem}.safetensors")
    return folder
