"""Tables from PyTorch's names and layouts to Flax's: one rule per line, nothing guessed.

A rule is (module in PyTorch, module in Flax, kind). `{i}`, `{j}` stand for numbers and are carried over; the kind tells
which tensors a module has and how each is laid out (LEAVES). Old and new names of a module are two rules with the same
target. `conversion.plan_conversion` accepts a checkpoint only if each tensor matches exactly one rule and each
parameter is filled exactly once, so a table cannot drop a tensor silently.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    torch: str
    flax: str | None  # None: the tensor is known but not needed
    kind: str
    optional: bool = False  # not needed by a model without this parameter


def dense(w: np.ndarray) -> np.ndarray:
    """[out, in] -> [in, out]; also for a 1x1 convolution, [out, in, 1, 1], that Flax holds as a matrix."""
    return w.reshape(w.shape[:2]).T


def conv(w: np.ndarray) -> np.ndarray:
    """[out, in, h, w] -> [h, w, in, out]."""
    return w.transpose(2, 3, 1, 0)


def dense_or_conv(w: np.ndarray) -> np.ndarray:
    """The transformer's projections: matrices if use_linear_projection is set, else 1x1 convolutions."""
    return w.T if w.ndim == 2 else conv(w)


def same(w: np.ndarray) -> np.ndarray:
    return w


def third(n: int, w: np.ndarray) -> np.ndarray:
    """The query (0), key (1) or value (2) of PyTorch's stacked attention projection, [3*out, in] or [3*out]."""
    # .T transposes a weight to [in, out] and leaves a bias as it is.
    return w.reshape(3, -1, *w.shape[1:])[n].T


Op = Callable[[np.ndarray], np.ndarray]

LEAVES: dict[str, dict[str, tuple[tuple[str, Op], ...]]] = {
    "dense": {"weight": (("kernel", dense),), "bias": (("bias", same),)},
    "conv": {"weight": (("kernel", conv),), "bias": (("bias", same),)},
    "dense_or_conv": {"weight": (("kernel", dense_or_conv),), "bias": (("bias", same),)},
    "norm": {"weight": (("scale", same),), "bias": (("bias", same),)},
    "embedding": {"weight": (("embedding", same),)},
    "array": {"": (("", same),)},
    "qkv": {
        f"in_proj_{torch}": tuple((f"{name}_proj/{flax}", partial(third, n)) for n, name in enumerate("qkv"))
        for torch, flax in (("weight", "kernel"), ("bias", "bias"))
    },
}
"""kind -> {tensor of the PyTorch module: (leaf of the Flax module, layout op) for each leaf that it fills}."""


def under(torch: str, flax: str, rules: list[Rule]) -> list[Rule]:
    """The rules of a sub-module at its place in a larger one."""
    return [r._replace(torch=f"{torch}.{r.torch}", flax=f"{flax}/{r.flax}") for r in rules]


RESNET = [
    Rule("norm1", "norm1", "norm"),
    Rule("conv1", "conv1", "conv"),
    Rule("time_emb_proj", "time_emb_proj", "dense"),
    Rule("norm2", "norm2", "norm"),
    Rule("conv2", "conv2", "conv"),
    Rule("conv_shortcut", "conv_shortcut", "conv"),
]

ATTENTION = [
    Rule("to_q", "to_q", "dense"),
    Rule("to_k", "to_k", "dense"),
    Rule("to_v", "to_v", "dense"),
    Rule("to_out.0", "to_out_0", "dense"),
]

TRANSFORMER = [
    Rule("norm", "norm", "norm"),
    Rule("proj_in", "proj_in", "dense_or_conv"),
    Rule("proj_out", "proj_out", "dense_or_conv"),
    *(Rule(f"transformer_blocks.{{k}}.norm{n}", f"transformer_blocks_{{k}}/norm{n}", "norm") for n in (1, 2, 3)),
    *under("transformer_blocks.{k}.attn1", "transformer_blocks_{k}/attn1", ATTENTION),
    *under("transformer_blocks.{k}.attn2", "transformer_blocks_{k}/attn2", ATTENTION),
    Rule("transformer_blocks.{k}.ff.net.0.proj", "transformer_blocks_{k}/ff/net_0/proj", "dense"),
    Rule("transformer_blocks.{k}.ff.net.2", "transformer_blocks_{k}/ff/net_2", "dense"),
]

ENDS = [
    Rule("conv_in", "conv_in", "conv"),
    Rule("conv_norm_out", "conv_norm_out", "norm"),
    Rule("conv_out", "conv_out", "conv"),
]
DOWN = [Rule("down_blocks.{i}.downsamplers.0.conv", "down_blocks_{i}/downsamplers_0/conv", "conv")]
UP = [Rule("up_blocks.{i}.upsamplers.0.conv", "up_blocks_{i}/upsamplers_0/conv", "conv")]

UNET = [
    *ENDS,
    Rule("time_embedding.linear_1", "time_embedding/linear_1", "dense"),
    Rule("time_embedding.linear_2", "time_embedding/linear_2", "dense"),
    Rule("add_embedding.linear_1", "add_embedding/linear_1", "dense"),  # SDXL
    Rule("add_embedding.linear_2", "add_embedding/linear_2", "dense"),
    *(
        r
        for block in ("down_blocks", "up_blocks")
        for r in under(f"{block}.{{i}}.resnets.{{j}}", f"{block}_{{i}}/resnets_{{j}}", RESNET)
    ),
    *(
        r
        for block in ("down_blocks", "up_blocks")
        for r in under(f"{block}.{{i}}.attentions.{{j}}", f"{block}_{{i}}/attentions_{{j}}", TRANSFORMER)
    ),
    *under("mid_block.resnets.{j}", "mid_block/resnets_{j}", RESNET),
    *under("mid_block.attentions.{j}", "mid_block/attentions_{j}", TRANSFORMER),
    *DOWN,
    *UP,
]

VAE_ATTENTION = [
    Rule("group_norm", "group_norm", "norm"),
    *(Rule(old, old, "dense") for old in ("query", "key", "value", "proj_attn")),  # before diffusers 0.17
    Rule("to_q", "query", "dense"),
    Rule("to_k", "key", "dense"),
    Rule("to_v", "value", "dense"),
    Rule("to_out.0", "proj_attn", "dense"),
]

VAE_MIDDLE = [
    *under("mid_block.resnets.{j}", "mid_block/resnets_{j}", RESNET),
    *under("mid_block.attentions.{j}", "mid_block/attentions_{j}", VAE_ATTENTION),
]

VAE = [
    *under(
        "encoder",
        "encoder",
        ENDS + VAE_MIDDLE + DOWN + under("down_blocks.{i}.resnets.{j}", "down_blocks_{i}/resnets_{j}", RESNET),
    ),
    *under(
        "decoder",
        "decoder",
        ENDS + VAE_MIDDLE + UP + under("up_blocks.{i}.resnets.{j}", "up_blocks_{i}/resnets_{j}", RESNET),
    ),
    Rule("quant_conv", "quant_conv", "conv"),
    Rule("post_quant_conv", "post_quant_conv", "conv"),
]

CLIP_LAYER = [
    *(Rule(f"self_attn.{p}", f"self_attn/{p}", "dense") for p in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(Rule(f"layer_norm{n}", f"layer_norm{n}", "norm") for n in (1, 2)),
    *(Rule(f"mlp.fc{n}", f"mlp/fc{n}", "dense") for n in (1, 2)),
]


def clip_text(prefix: str) -> list[Rule]:
    """The rules for a text encoder whose names begin with `prefix`."""
    return [
        Rule(f"{prefix}embeddings.token_embedding", "text_model/embeddings/token_embedding", "embedding"),
        Rule(f"{prefix}embeddings.position_embedding", "text_model/embeddings/position_embedding", "embedding"),
        # 0..76, and the mask of the future: written by older versions of transformers.
        *(
            Rule(f"{prefix}{name}", None, "array")
            for name in ("embeddings.position_ids", "encoder.causal_attention_mask")
        ),
        *under(f"{prefix}encoder.layers.{{i}}", "text_model/encoder/layers/{i}", CLIP_LAYER),
        Rule(f"{prefix}final_layer_norm", "text_model/final_layer_norm", "norm"),
    ]


def clip_vision(prefix: str) -> list[Rule]:
    """The rules for an image encoder whose names begin with `prefix`."""
    return [
        Rule(f"{prefix}embeddings.class_embedding", "vision_model/embeddings/class_embedding", "array"),
        Rule(f"{prefix}embeddings.patch_embedding", "vision_model/embeddings/patch_embedding", "conv"),
        Rule(f"{prefix}embeddings.position_embedding", "vision_model/embeddings/position_embedding", "embedding"),
        Rule(f"{prefix}embeddings.position_ids", None, "array"),
        Rule(f"{prefix}pre_layrnorm", "vision_model/pre_layrnorm", "norm"),
        *under(f"{prefix}encoder.layers.{{i}}", "vision_model/encoder/layers/{i}", CLIP_LAYER),
        Rule(f"{prefix}post_layernorm", "vision_model/post_layernorm", "norm"),
    ]


# Some files of a text encoder without a projection have one all the same, left from the whole CLIP.
TEXT_PROJECTION = Rule("text_projection", "text_projection", "dense", optional=True)
VISUAL_PROJECTION = Rule("visual_projection", "visual_projection", "dense")
LOGIT_SCALE = Rule("logit_scale", None, "array")

# transformers 5 saves an encoder by itself without the prefix.
CLIP_TEXT = [
    *clip_text(""),
    *clip_text("text_model."),
    TEXT_PROJECTION._replace(torch="text_model.text_projection"),
    TEXT_PROJECTION,
    *(Rule(name, None, "array") for name in ("logit_scale", "text_model.logit_scale", "position_ids")),
]
CLIP_VISION = [*clip_vision(""), *clip_vision("vision_model."), VISUAL_PROJECTION, LOGIT_SCALE]
CLIP = [*clip_text("text_model."), *clip_vision("vision_model."), TEXT_PROJECTION, VISUAL_PROJECTION, LOGIT_SCALE]
"""transformers' CLIPModel: both encoders in one file. Cosine similarities do not need logit_scale."""

VIT_LAYER = [
    *(Rule(f"attention.attention.{name}", f"self_attn/{name[0]}_proj", "dense") for name in ("query", "key", "value")),
    Rule("attention.output.dense", "self_attn/out_proj", "dense"),
    Rule("layernorm_before", "layer_norm1", "norm"),
    Rule("layernorm_after", "layer_norm2", "norm"),
    Rule("intermediate.dense", "mlp/fc1", "dense"),
    Rule("output.dense", "mlp/fc2", "dense"),
]

VIT = [
    Rule("embeddings.cls_token", "cls_token", "array"),
    Rule("embeddings.position_embeddings", "position_embeddings", "array"),
    Rule("embeddings.patch_embeddings.projection", "patch_embedding", "conv"),
    *under("encoder.layer.{i}", "encoder/layers/{i}", VIT_LAYER),
    Rule("layernorm", "layernorm", "norm"),
    Rule("pooler.dense.weight", None, "array"),  # DINO has no pooler; if a file has one, it was never trained
    Rule("pooler.dense.bias", None, "array"),
]
"""transformers' ViTModel, the layout of facebook/dino-vits16."""
