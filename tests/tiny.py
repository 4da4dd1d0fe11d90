"""A tiny random Stable Diffusion in diffusers layout: the real format, so small that a command takes seconds."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from catversion_jax import pipeline
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
NAMES = {"text": "text_encoder", "unet": "unet", "vae": "vae"}
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
        for torch_leaf, (flax_leaf, _) in LEAVES[rule.kind].items():
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


def write(folder: Path, seed: int = 0, dtype=np.float16) -> Path:
    """Write the model to `folder` and return it."""
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(pipeline.MINI / part, folder / part, dirs_exist_ok=True)
    for name, part in NAMES.items():
        component = pipeline.COMPONENTS[name]
        config = json.loads((pipeline.MINI / part / "config.json").read_text()) | CHANGES[part]
        module = component.make(config, np.float32)
        params = random_params(pipeline.abstract(name, module), np.random.default_rng(seed))
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        tensors = {key: value.astype(dtype) for key, value in to_torch(params, component.rules).items()}
        save_file(tensors, folder / part / f"{stem}.safetensors")
    return folder
