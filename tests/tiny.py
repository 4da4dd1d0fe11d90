"""A tiny random Stable Diffusion in diffusers layout: the real format, so small that a command takes seconds."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from catversion_jax.base import pipeline
from catversion_jax.methods import concept_file
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from catversion_jax.models.vit import ViTConfig, ViTModel
from catversion_jax.utils.json_config import from_json
from catversion_jax.weights import rules, source
from catversion_jax.weights.conversion import shapes_of
from catversion_jax.weights.rules import LEAVES, Rule

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
IMAGE_CHANGES = {
    "image_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 16,
    },
}
"""To be written into the folder of a tiny model that is to judge pictures."""
INVERSE = {
    "kernel": lambda w: w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T,
    "scale": lambda w: w,
    "bias": lambda w: w,
    "embedding": lambda w: w,
    "class_embedding": lambda w: w,
    "cls_token": lambda w: w,
    "position_embeddings": lambda w: w,
}


def load(folder: Path | str, **how) -> pipeline.BasePipeline:
    """A model's pipeline on the default device; `how` are fields of ModelConfig."""
    return pipeline.load_pipeline(pipeline.ModelConfig(str(folder), **how))


def concept(prefix: np.ndarray, fingerprint: str, model: Path | str = "", **method) -> concept_file.Concept:
    """A concept of a random prefix in the tiny model's upper layers."""
    of_method = CatVersion(**{"layers": ((1, 2, 3),)} | method)
    return concept_file.Concept({"prefix": prefix}, of_method, "teapot", (), fingerprint, str(model), 1, 0.01, 0)


def to_torch(params: dict, table: list[Rule]) -> dict[str, np.ndarray]:
    """PyTorch's tensors of a Flax tree: the conversion backwards, written apart from it."""
    names = {}
    for rule in table:
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
        stem = "model" if name.startswith(("text", "image")) else "diffusion_pytorch_model"
        tensors = {key: value.astype(dtype) for key, value in to_torch(params, source.RULES[name]).items()}
        save_file(tensors, folder / part / f"{stem}.safetensors")
    return folder


def save_run(path: Path, concept: concept_file.Concept) -> None:
    """Saves a concept as its run does: the config beside it tells where its model is."""
    concept_file.save(path, concept)
    (path.parent / "config.json").write_text(json.dumps({"model.path": str(concept.model_path)}))


CLIP = {
    "model_type": "clip",
    "projection_dim": 24,
    "text_config": {
        "vocab_size": 1584,
        "eos_token_id": 1583,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 16,
    },
}
DINO = {"model_type": "vit", "num_hidden_layers": 2, "image_size": 32, "patch_size": 16} | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}


def write_clip(folder: Path) -> Path:
    """A random CLIP in the layout of transformers' CLIPModel, with the mini model's tokenizer."""
    shutil.copytree(pipeline.MINI / "tokenizer", folder)
    shared = {"projection_dim": CLIP["projection_dim"]}
    text = CLIPTextModel(from_json(CLIPTextConfig, CLIP["text_config"] | shared, {}))
    image = CLIPVisionModel(from_json(CLIPVisionConfig, CLIP["vision_config"] | shared, {}))
    shapes = pipeline.abstract("text", text) | pipeline.abstract("image", image)
    tensors = to_torch(random_params(shapes, np.random.default_rng(0)), rules.CLIP)
    save_file(tensors | {"logit_scale": np.ones((), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CLIP))
    return folder


def write_dino(folder: Path) -> Path:
    """A random vision transformer in the layout of transformers' ViTModel."""
    module = ViTModel(from_json(ViTConfig, DINO, {}))
    shapes = shapes_of(module.init, jnp.zeros((1, DINO["image_size"], DINO["image_size"], 3)))
    folder.mkdir()
    tensors = to_torch(random_params(shapes, np.random.default_rng(0)), rules.VIT)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(DINO))
    return folder
