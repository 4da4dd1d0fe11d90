"""Narrowed Stable Diffusion 1.x, 2.x and XL models, and their single files, named as the original code names them.

The names are made from diffusers' by rewriting them, apart from the tables that read them.
"""

import json
from collections.abc import Mapping
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.unet import UNet2DConditionModel, UNetConfig
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.utils.json_config import from_json
from catversion_jax.weights import rules
from catversion_jax.weights.conversion import shapes_of
from tests import tiny

TEXT = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 60,
    "max_position_embeddings": 77,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
    "projection_dim": 64,
    "eos_token_id": 2,
}
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 128, "hidden_act": "gelu"}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "use_linear_projection": False,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 128,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "scaling_factor": 0.18215,
}

CONFIGS = {
    "sd1": {"text": TEXT, "unet": UNET, "vae": VAE},
    "sd2": {
        "text": TEXT | WIDE | {"num_hidden_layers": 23},
        "unet": UNET
        | {
            "sample_size": 96,
            "block_out_channels": [64, 128],
            "attention_head_dim": [1, 2],
            "cross_attention_dim": 128,
            "use_linear_projection": True,
        },
        "vae": VAE | {"sample_size": 192},
    },
    "sdxl": {
        "text": TEXT,
        "text_2": TEXT | WIDE | {"architectures": ["CLIPTextModelWithProjection"], "num_hidden_layers": 3},
        "unet": UNET
        | {
            "sample_size": 128,
            "block_out_channels": [64, 64, 128],
            "attention_head_dim": [1, 1, 2],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 3],
            "cross_attention_dim": 192,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 128,
        },
        "vae": VAE | {"sample_size": 256, "scaling_factor": 0.13025},
    },
}
"""family -> component -> what its config.json says."""

RULES = {"text": rules.CLIP_TEXT, "text_2": rules.CLIP_TEXT, "unet": rules.UNET, "vae": rules.VAE}


def text_shapes(config: dict) -> dict:
    projection = config["projection_dim"] if "CLIPTextModelWithProjection" in config["architectures"] else None
    model = CLIPTextModel(from_json(CLIPTextConfig, config | {"projection_dim": projection}, {}))
    return shapes_of(model.init, jnp.zeros((1, 77), jnp.int32))


def unet_shapes(config: dict) -> dict:
    model = UNet2DConditionModel(UNetConfig.from_json(config))
    pooled = jnp.zeros((1, 128)) if config.get("addition_embed_type") else None
    context = jnp.zeros((1, 77, config["cross_attention_dim"]))
    return shapes_of(model.init, jnp.zeros((1, 16, 16, config["in_channels"])), jnp.zeros((1,)), context, pooled)


def vae_shapes(config: dict) -> dict:
    return shapes_of(AutoencoderKL(VAEConfig.from_json(config)).init, jnp.zeros((1, 16, 16, 3)))


SHAPES = {"text": text_shapes, "text_2": text_shapes, "unet": unet_shapes, "vae": vae_shapes}


def shapes(component: str, config: dict) -> dict:
    """The shapes of the Flax parameters that a config describes."""
    return shapes_of_json(component, json.dumps(config))


@cache
def shapes_of_json(component: str, config: str) -> dict:
    return SHAPES[component](json.loads(config))


@cache
def random_params(family: str) -> dict[str, dict]:
    """component -> float16 parameters, so that every format holds the same numbers."""
    rng = np.random.default_rng(0)
    return {
        component: jax.tree.map(
            lambda leaf: leaf.astype(np.float16), tiny.random_params(shapes(component, config), rng)
        )
        for component, config in CONFIGS[family].items()
    }


def to_diffusers(params: Mapping[str, dict]) -> dict[str, dict[str, np.ndarray]]:
    """component -> tensors, as diffusers and transformers name them."""
    return {component: tiny.to_torch(tree, RULES[component]) for component, tree in params.items()}


# ---- diffusers' names to the original ones

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, config: dict) -> str:
    layers = config["layers_per_block"]
    match name.split("."):
        case ["down_blocks", i, "resnets", j, module, leaf]:
            return f"input_blocks.{1 + int(i) * (layers + 1) + int(j)}.0.{UNET_RESNET[module]}.{leaf}"
        case ["down_blocks", i, "attentions", j, *rest]:
            return f"input_blocks.{1 + int(i) * (layers + 1) + int(j)}.1.{'.'.join(rest)}"
        case ["down_blocks", i, "downsamplers", "0", "conv", leaf]:
            return f"input_blocks.{(int(i) + 1) * (layers + 1)}.0.op.{leaf}"
        case ["up_blocks", i, "resnets", j, module, leaf]:
            return f"output_blocks.{int(i) * (layers + 1) + int(j)}.0.{UNET_RESNET[module]}.{leaf}"
        case ["up_blocks", i, "attentions", j, *rest]:
            return f"output_blocks.{int(i) * (layers + 1) + int(j)}.1.{'.'.join(rest)}"
        case ["up_blocks", i, "upsamplers", "0", "conv", leaf]:
            behind = 2 if config["up_block_types"][int(i)].startswith("CrossAttn") else 1
            return f"output_blocks.{int(i) * (layers + 1) + layers}.{behind}.conv.{leaf}"
        case ["mid_block", "resnets", j, module, leaf]:
            return f"middle_block.{2 * int(j)}.{UNET_RESNET[module]}.{leaf}"
        case ["mid_block", "attentions", "0", *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
    module, leaf = name.rsplit(".", 1)
    return f"{UNET_ENDS[module]}.{leaf}"


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_name(name: str, config: dict) -> str:
    last = len(config["block_out_channels"]) - 1
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    match name.split("."):
        case [side, "down_blocks", i, "resnets", j, *rest]:
            return f"{side}.down.{i}.block.{j}.{'.'.join(rest)}"
        case [side, "down_blocks", i, "downsamplers", "0", *rest]:
            return f"{side}.down.{i}.downsample.{'.'.join(rest)}"
        case [side, "up_blocks", i, "resnets", j, *rest]:
            return f"{side}.up.{last - int(i)}.block.{j}.{'.'.join(rest)}"
        case [side, "up_blocks", i, "upsamplers", "0", *rest]:
            return f"{side}.up.{last - int(i)}.upsample.{'.'.join(rest)}"
        case [side, "mid_block", "resnets", j, *rest]:
            return f"{side}.mid.block_{int(j) + 1}.{'.'.join(rest)}"
        case [side, "mid_block", "attentions", "0", *module, leaf]:
            return f"{side}.mid.attn_1.{VAE_ATTENTION['.'.join(module)]}.{leaf}"
    return name


OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(tensors: Mapping[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    out = {new: tensors[old] for old, new in OPEN_CLIP.items()}
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            for old, new in OPEN_CLIP_LAYER.items():
                out[f"transformer.resblocks.{i}.{new}.{leaf}"] = tensors[f"{layer}.{old}.{leaf}"]
            parts = [tensors[f"{layer}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            out[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    return out


def sd1_text(tensors: Mapping[str, Mapping[str, np.ndarray]], configs: dict) -> dict[str, np.ndarray]:
    ids = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    return {f"cond_stage_model.transformer.{name}": value for name, value in (tensors["text"] | ids).items()}


def sd2_text(tensors: Mapping[str, Mapping[str, np.ndarray]], configs: dict) -> dict[str, np.ndarray]:
    """With the 24th layer and the projection, which Stable Diffusion does not use."""
    out = open_clip(tensors["text"], configs["text"]["num_hidden_layers"])
    unused = {name.replace(".22.", ".23."): value + 1 for name, value in out.items() if ".22." in name}
    others = {"text_projection": np.ones((128, 128), np.float16), "logit_scale": np.ones((), np.float16)}
    return {f"cond_stage_model.model.{name}": value for name, value in (out | unused | others).items()}


def sdxl_text(tensors: Mapping[str, Mapping[str, np.ndarray]], configs: dict) -> dict[str, np.ndarray]:
    second = open_clip(tensors["text_2"], configs["text_2"]["num_hidden_layers"])
    second["text_projection"] = np.ascontiguousarray(tensors["text_2"]["text_projection.weight"].T)
    second["logit_scale"] = np.ones((), np.float16)
    first = {f"conditioner.embedders.0.transformer.{name}": value for name, value in tensors["text"].items()}
    return first | {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}


TEXTS = {"sd1": sd1_text, "sd2": sd2_text, "sdxl": sdxl_text}
LEFT_OVERS = {
    "alphas_cumprod": np.ones(1000, np.float32),
    "model_ema.decay": np.ones((), np.float32),
    "model_ema.diffusion_modeltime_embed0weight": np.ones((2, 2), np.float16),
}


def to_ldm(tensors: Mapping[str, Mapping[str, np.ndarray]], family: str) -> dict[str, np.ndarray]:
    """The tensors of a single file, from diffusers' of each component."""
    configs = CONFIGS[family]
    unet = {unet_name(name, configs["unet"]): value for name, value in tensors["unet"].items()}
    vae = {vae_name(name, configs["vae"]): value for name, value in tensors["vae"].items()}
    vae = {
        name: value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value for name, value in vae.items()
    }
    return {
        **{f"model.diffusion_model.{name}": value for name, value in unet.items()},
        **{f"first_stage_model.{name}": value for name, value in vae.items()},
        **TEXTS[family](tensors, configs),
        **LEFT_OVERS,
    }
