"""Single-file checkpoints, named as in the original code (CompVis' latent-diffusion, Stability's generative-models).

The tensors' names tell which model family a file holds, and their shapes tell its configs; what shapes do not tell
(heads, activations, the scheduler) is fixed for each family. The rules match the file's own names, which begin with the
component's prefix, and are generated from the configs.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

from catversion_jax.utils.errors import UserError, listed
from catversion_jax.weights.foreign import what_file
from catversion_jax.weights.rules import CLIP_TEXT, ENDS, RESNET, TRANSFORMER, Rule, under
from catversion_jax.weights.tensor import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a component's tensors by name, without the component's prefix."""

HEAD_DIM = 64  # in all text encoders, and in the UNet from 2.x on


class Text(NamedTuple):
    """A text encoder in a file."""

    prefix: str
    is_open_clip: bool
    projects: bool = False  # its text_projection is used
    last_layer: int | None = None  # number of used layers, if the file has one more


class Family(NamedTuple):
    name: str
    texts: dict[str, Text]
    heads: Callable[[list[int]], int | list[int]]  # block_out_channels -> attention_head_dim, which counts heads
    sample_sizes: dict[str, int]  # prediction_type -> latents along each side
    prediction_type: str  # if the config does not say
    scaling_factor: float
    scheduler: dict

    @property
    def is_ambiguous(self) -> bool:
        """Whether models of both prediction types were published, for pictures of different sizes."""
        return len(set(self.sample_sizes.values())) > 1

    @property
    def prefixes(self) -> dict[str, str]:
        """component -> the prefix of its tensors' names."""
        texts = {component: text.prefix for component, text in self.texts.items()}
        return texts | {"unet": "model.diffusion_model.", "vae": "first_stage_model."}


def count_matches(shapes: Shapes, pattern: str) -> int:
    """Counts the different numbers that the group of `pattern` matches, at the start of the names."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


# ---- text encoders


def text_config_of(shapes: Shapes, text: Text) -> dict:
    """The config of a text encoder: OpenAI's CLIP has transformers' names, OpenCLIP has its own."""
    names = OPEN_CLIP_NAMES if text.is_open_clip else CLIP_NAMES
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocabulary, hidden = shapes[names["tokens"]]
    layers = count_matches(shapes, names["layers"])
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projects else "CLIPTextModel"],
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[names["positions"]][0],
        "hidden_size": hidden,
        "intermediate_size": shapes[names["mlp"]][0],
        "num_hidden_layers": min(layers, text.last_layer or layers),
        "num_attention_heads": hidden // HEAD_DIM,
        "hidden_act": names["activation"],
        "projection_dim": shapes["text_projection"][1] if text.projects else hidden,
        "eos_token_id": 2,  # read as: the largest id of a sequence (models/clip.py)
    }


CLIP_NAMES = {
    "tokens": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    "mlp": "encoder.layers.0.mlp.fc1.weight",
    "layers": r"encoder\.layers\.(\d+)\.",
    "activation": "quick_gelu",
}
OPEN_CLIP_NAMES = {
    "tokens": "token_embedding.weight",
    "positions": "positional_embedding",
    "mlp": "transformer.resblocks.0.mlp.c_fc.weight",
    "layers": r"transformer\.resblocks\.(\d+)\.",
    "activation": "gelu",
}

OPEN_CLIP_LAYER = [
    Rule("ln_1", "layer_norm1", "norm"),
    Rule("attn", "self_attn", "qkv"),
    Rule("attn.out_proj", "self_attn/out_proj", "dense"),
    Rule("ln_2", "layer_norm2", "norm"),
    Rule("mlp.c_fc", "mlp/fc1", "dense"),
    Rule("mlp.c_proj", "mlp/fc2", "dense"),
]


def open_clip_rules(text: Text, config: dict) -> list[Rule]:
    used = config["num_hidden_layers"]
    layers = [
        under(f"transformer.resblocks.{i}", f"text_model/encoder/layers/{i}", OPEN_CLIP_LAYER) for i in range(used)
    ]
    unused = under(f"transformer.resblocks.{text.last_layer}", "", OPEN_CLIP_LAYER) if text.last_layer else []
    return [
        Rule("token_embedding", "text_model/embeddings/token_embedding", "embedding"),
        Rule("positional_embedding", "text_model/embeddings/position_embedding/embedding", "array"),
        *(rule for layer in layers for rule in layer),
        *(rule._replace(flax=None) for rule in unused),
        Rule("ln_final", "text_model/final_layer_norm", "norm"),
        Rule("text_projection", "text_projection/kernel" if text.projects else None, "array"),  # [in, out] already
    ]


# ---- UNet


def unet_config(shapes: Shapes, family: Family, prediction_type: str) -> dict:
    blocks = count_matches(shapes, r"input_blocks\.(\d+)\.")
    downsamplers = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in shapes]
    step = downsamplers[0] if downsamplers else blocks  # input blocks of a level
    firsts = [1, *(n + 1 for n in downsamplers)]
    channels = [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts]
    depths = [count_matches(shapes, rf"input_blocks\.{n}\.1\.transformer_blocks\.(\d+)\.") for n in firsts]
    middle = count_matches(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    # As in diffusers, the last level's entry is also that of the middle block, and levels without attention have 1.
    layers = [*(depth or 1 for depth in depths[:-1]), depths[-1] or middle]
    added = {}
    if "label_emb.0.0.weight" in shapes:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": family.sample_sizes[prediction_type],
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": step - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": 1 if set(layers) == {1} else layers,
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": family.heads(channels),
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
        **added,
    }


LDM_RESNET = [
    Rule("in_layers.0", "norm1", "norm"),
    Rule("in_layers.2", "conv1", "conv"),
    Rule("emb_layers.1", "time_emb_proj", "dense"),
    Rule("out_layers.0", "norm2", "norm"),
    Rule("out_layers.3", "conv2", "conv"),
    Rule("skip_connection", "conv_shortcut", "conv"),
]


def unet_rules(config: dict) -> list[Rule]:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    rules = [
        Rule("input_blocks.0.0", "conv_in", "conv"),
        Rule("time_embed.0", "time_embedding/linear_1", "dense"),
        Rule("time_embed.2", "time_embedding/linear_2", "dense"),
        Rule("label_emb.0.0", "add_embedding/linear_1", "dense"),
        Rule("label_emb.0.2", "add_embedding/linear_2", "dense"),
        *under("middle_block.0", "mid_block/resnets_0", LDM_RESNET),
        *under("middle_block.1", "mid_block/attentions_0", TRANSFORMER),
        *under("middle_block.2", "mid_block/resnets_1", LDM_RESNET),
        Rule("out.0", "conv_norm_out", "norm"),
        Rule("out.2", "conv_out", "conv"),
    ]
    for i in range(levels):
        # A level has `layers` input blocks and, except for the last level, one that downsamples; and `layers` + 1
        # output blocks, the last of which also upsamples, after its resnet or its attention (hence .1 or .2).
        down, up = 1 + i * (layers + 1), i * (layers + 1)
        for j in range(layers):
            rules += under(f"input_blocks.{down + j}.0", f"down_blocks_{i}/resnets_{j}", LDM_RESNET)
            rules += under(f"input_blocks.{down + j}.1", f"down_blocks_{i}/attentions_{j}", TRANSFORMER)
        for j in range(layers + 1):
            rules += under(f"output_blocks.{up + j}.0", f"up_blocks_{i}/resnets_{j}", LDM_RESNET)
            rules += under(f"output_blocks.{up + j}.1", f"up_blocks_{i}/attentions_{j}", TRANSFORMER)
        rules += [
            Rule(f"input_blocks.{down + layers}.0.op", f"down_blocks_{i}/downsamplers_0/conv", "conv"),
            Rule(f"output_blocks.{up + layers}.1.conv", f"up_blocks_{i}/upsamplers_0/conv", "conv"),
            Rule(f"output_blocks.{up + layers}.2.conv", f"up_blocks_{i}/upsamplers_0/conv", "conv"),
        ]
    return rules


# ---- VAE


def vae_config(shapes: Shapes, family: Family, prediction_type: str) -> dict:
    levels = count_matches(shapes, r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": family.sample_sizes[prediction_type] << levels - 1,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": count_matches(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": family.scaling_factor,
    }


LDM_VAE_RESNET = [
    *(rule for rule in RESNET if rule.torch not in ("time_emb_proj", "conv_shortcut")),
    Rule("nin_shortcut", "conv_shortcut", "conv"),
]

LDM_VAE_ATTENTION = [
    Rule("norm", "group_norm", "norm"),
    Rule("q", "query", "dense"),
    Rule("k", "key", "dense"),
    Rule("v", "value", "dense"),
    Rule("proj_out", "proj_attn", "dense"),
]

LDM_VAE_COMMON = [
    *(rule for rule in ENDS if rule.torch != "conv_norm_out"),
    Rule("norm_out", "conv_norm_out", "norm"),
    *under("mid.block_1", "mid_block/resnets_0", LDM_VAE_RESNET),
    *under("mid.attn_1", "mid_block/attentions_0", LDM_VAE_ATTENTION),
    *under("mid.block_2", "mid_block/resnets_1", LDM_VAE_RESNET),
]


def vae_rules(config: dict) -> list[Rule]:
    down = [
        *under("down.{i}.block.{j}", "down_blocks_{i}/resnets_{j}", LDM_VAE_RESNET),
        Rule("down.{i}.downsample.conv", "down_blocks_{i}/downsamplers_0/conv", "conv"),
    ]
    up = []
    for i in range(levels := len(config["block_out_channels"])):  # numbered from the output
        up += under(f"up.{levels - 1 - i}.block.{{j}}", f"up_blocks_{i}/resnets_{{j}}", LDM_VAE_RESNET)
        up += [Rule(f"up.{levels - 1 - i}.upsample.conv", f"up_blocks_{i}/upsamplers_0/conv", "conv")]
    return [
        *under("encoder", "encoder", LDM_VAE_COMMON + down),
        *under("decoder", "decoder", LDM_VAE_COMMON + up),
        Rule("quant_conv", "quant_conv", "conv"),
        Rule("post_quant_conv", "post_quant_conv", "conv"),
    ]


# ---- families

NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR_NOISE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Added to NOISE for a model that was trained from no signal at all: sampling has to begin there (Lin et al. 2024)."""


def heads_of_channels(channels: list[int]) -> list[int]:
    return [c // HEAD_DIM for c in channels]


FAMILIES = (
    Family(
        name="Stable Diffusion 1.x",
        texts={"text": Text("cond_stage_model.transformer.", is_open_clip=False)},
        heads=lambda channels: 8,
        sample_sizes={"epsilon": 64, "v_prediction": 64},
        prediction_type="epsilon",
        scaling_factor=0.18215,
        scheduler=NOISE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    ),
    Family(
        name="Stable Diffusion 2.x",
        texts={"text": Text("cond_stage_model.model.", is_open_clip=True, last_layer=23)},
        heads=heads_of_channels,
        sample_sizes={"epsilon": 64, "v_prediction": 96},
        prediction_type="v_prediction",
        scaling_factor=0.18215,
        scheduler=NOISE | {"_class_name": "DDIMScheduler"},
    ),
    Family(
        name="Stable Diffusion XL",
        texts={
            "text": Text("conditioner.embedders.0.transformer.", is_open_clip=False),
            "text_2": Text("conditioner.embedders.1.model.", is_open_clip=True, projects=True),
        },
        heads=heads_of_channels,
        sample_sizes={"epsilon": 128, "v_prediction": 128},
        prediction_type="epsilon",
        scaling_factor=0.13025,
        scheduler=NOISE
        | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "interpolation_type": "linear"},
    ),
    Family(
        name="SD Turbo",  # Stable Diffusion 2.1's networks, with names like those of XL
        texts={"text": Text("conditioner.embedders.0.model.", is_open_clip=True, last_layer=23)},
        heads=heads_of_channels,
        sample_sizes={"epsilon": 64, "v_prediction": 64},
        prediction_type="epsilon",
        scaling_factor=0.18215,
        scheduler=NOISE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    ),
)

LEFT_OVERS = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*"  # left from training
    r"|betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|lvlb_weights|logvar"
    r"|denoiser\.(log_)?sigmas|scale_factor|global_step"
    r"|(cond_stage_model|conditioner\.embedders\.[01])\.((model|transformer)\.)?(logit_scale|attn_mask)"
    r"|cond_stage_model\.text_projection(\.weight)?|v_pred|ztsnr"
)
"""Names of tensors that files hold beside the model, and that are ignored."""

REFINERS = "model.diffusion_model.label_emb."
"""XL's refiner has the text encoder of SD Turbo, by name, and these too."""


def identify(names: Collection[str], path: str) -> Family:
    """Returns the family of a file's tensors. Raises UserError for any other file and for names of no component."""
    expected = "expected a whole Stable Diffusion 1.x, 2.x or XL model in one file"

    def missing(family: Family) -> list[str]:
        return [
            f"{component} ({prefix}*)"
            for component, prefix in family.prefixes.items()
            if not any(name.startswith(prefix) for name in names)
        ]

    family = min(FAMILIES, key=lambda family: len(missing(family)))
    if missing(family):
        what = what_file(names) if len(missing(family)) > 1 else ""
        said = f"this is {what}" if what else f"lacks {', '.join(missing(family))}"
        raise UserError(f"{path}: {said}; {expected}")
    if family.name == "SD Turbo" and any(name.startswith(REFINERS) for name in names):
        raise UserError(f"{path}: this is the refiner of Stable Diffusion XL; give the base model; {expected}")
    prefixes = tuple(family.prefixes.values())
    unknown = sorted(name for name in names if not name.startswith(prefixes) and not LEFT_OVERS.fullmatch(name))
    if unknown:
        what = what_file(unknown)
        said = f"this is {what}; " if what else ""
        raise UserError(f"{path}: {said}{family.name} has no {listed(unknown)}; {expected}")
    return family


def split(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """component -> its tensors, by their names in the file."""
    return {
        component: {
            name: tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix) and not LEFT_OVERS.fullmatch(name)
        }
        for component, prefix in family.prefixes.items()
    }


def configs(family: Family, components: Mapping[str, Mapping[str, Tensor]], prediction_type: str) -> dict[str, dict]:
    """component -> its config. Raises KeyError, IndexError or ValueError if a tensor that this needs is missing."""
    shapes = {
        component: {name.removeprefix(family.prefixes[component]): t.shape for name, t in tensors.items()}
        for component, tensors in components.items()
    }
    return {
        **{component: text_config_of(shapes[component], text) for component, text in family.texts.items()},
        "unet": unet_config(shapes["unet"], family, prediction_type),
        "vae": vae_config(shapes["vae"], family, prediction_type),
    }


def rules(family: Family, component: str, config: dict) -> list[Rule]:
    """The rules for the names of a component in the file."""
    tables = {"unet": unet_rules, "vae": vae_rules} | {
        name: partial(open_clip_rules, text) if text.is_open_clip else lambda config: CLIP_TEXT
        for name, text in family.texts.items()
    }
    return [rule._replace(torch=family.prefixes[component] + rule.torch) for rule in tables[component](config)]
