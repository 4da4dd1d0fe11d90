"""The encoders that score images: CLIP (a base model's own, or a CLIPModel folder) and DINO."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from catversion_jax.base.pipeline import MINI, abstract, check_tokenizer, laid_out, load_component
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.evaluation.metrics import normalize
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from catversion_jax.models.vit import FIXED as VIT_FIXED
from catversion_jax.models.vit import ViTConfig, ViTModel
from catversion_jax.utils.compiler import jit
from catversion_jax.utils.errors import UserError, told
from catversion_jax.utils.json_config import Width, from_json
from catversion_jax.utils.padded_batches import in_batches, streamed
from catversion_jax.utils.paths import AnyPath, expand, is_remote
from catversion_jax.utils.records import convert, read_record
from catversion_jax.utils.types import Float, Params, UInt8
from catversion_jax.weights import hub, rules
from catversion_jax.weights.bucket_files import fetch_from_bucket
from catversion_jax.weights.conversion import from_torch, shapes_of
from catversion_jax.weights.source import TOKENIZER_FILES, open_source
from catversion_jax.weights.weight_files import FORMATS, file_patterns, find_weights, open_weights

TORCH_FORMATS = [form for form in FORMATS if not form.is_flax]

TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "eos_token_id": 49407}
"""Defaults of transformers that a CLIPModel's config.json leaves out, where they differ from ours."""

MAX_ASPECT = 16
"""The largest ratio of an image's edges whose whole is resized; of a longer one, only the middle."""


@dataclass(frozen=True)
class NestedConfig:
    """The config.json of a CLIPModel."""

    text_config: dict[str, Any] = field(default_factory=dict)
    vision_config: dict[str, Any] = field(default_factory=dict)
    projection_dim: Width = 512


@dataclass(frozen=True)
class Preprocessing:
    """Bicubic resize of the shorter edge to `edge`, centre crop to `size`, normalization by mean and deviation."""

    edge: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "{self.size} {self.size} 3"]:
        image = less_narrow(image)
        height, width = image.shape[:2]
        short = min(height, width)
        wide, high = (int(self.edge * length / short) for length in (width, height))
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        resized = Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC)
        square = np.asarray(resized.crop((left, top, left + self.size, top + self.size)), np.float32)
        return (square / 255 - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def less_narrow(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the middle of an image that is more than MAX_ASPECT times as long as wide, and others as they are."""
    # Resizing the shorter edge of 20000 x 1 pixels to 224 would take gigabytes, for a crop of the middle.
    height, width = image.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return image[top : top + longest, left : left + longest]


def clip_preprocessing(size: int) -> Preprocessing:
    """Returns OpenAI's preprocessing, which all sizes of CLIP share."""
    return Preprocessing(size, size, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def dino_preprocessing(size: int) -> Preprocessing:
    """Returns that of DINO's own evaluation: resized to 256 px, cropped to 224, ImageNet's mean and deviation."""
    return Preprocessing(size * 256 // 224, size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@partial(jit, static_argnames=("module",))
def embed_pixels(params: Params, pixels, *, module):
    return module.apply({"params": params}, pixels)


@partial(jit, static_argnames=("module",))
def embed_tokens(params: Params, token_ids, *, module):
    return module.apply({"params": params}, token_ids)["text_embeds"]


@dataclass(frozen=True)
class ImageEncoder:
    name: str  # where it was read from
    module: CLIPVisionModel | ViTModel
    params: Params
    preprocessing: Preprocessing

    def __call__(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "N e"]:
        """Returns unit embeddings of images of any size."""
        return self.of_pixels(map(self.preprocessing, images))

    def of_pixels(self, pixels: Iterable[Float[np.ndarray, "size size 3"]]) -> Float[np.ndarray, "N e"]:
        """Returns unit embeddings of images that are preprocessed already."""
        return normalize(streamed(partial(embed_pixels, self.params, module=self.module), pixels))

    def described(self) -> dict:
        """Returns what has to be reported with every score of this encoder."""
        config = self.module.config
        network = {"layers": config.num_hidden_layers, "width": config.hidden_size, "patch": config.patch_size}
        return {"name": self.name, **network, "resize": "bicubic", **asdict(self.preprocessing)}


@dataclass(frozen=True)
class TextEncoder:
    module: CLIPTextModel
    params: Params
    tokenizer: Tokenizer

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "N e"]:
        """Returns unit embeddings of prompts, in the image encoder's space."""
        token_ids = self.tokenizer(list(prompts))
        return normalize(in_batches(partial(embed_tokens, self.params, module=self.module), token_ids))


@dataclass(frozen=True)
class Clip:
    """CLIP's image encoder and text encoder."""

    image: ImageEncoder
    text: TextEncoder


def of_model(path: str | AnyPath) -> Clip:
    """Loads CLIP from a base model's folder that has an image encoder beside the text encoder, like the mini model's.

    Raises UserError if it has none.
    """
    source = open_source(str(path)) if expand(path).is_dir() else None  # a published model has none
    if source is None or "image" not in source.components:
        raise UserError(
            f"{path}: no image_encoder/ to score images by; name a CLIP, such as openai/clip-vit-large-patch14, or a "
            "folder of one"
        )
    image, image_params = load_component(source, "image")
    text, text_params = load_component(source, "text")
    tokenizer = Tokenizer(source.tokenizer("text"))
    check_tokenizer(tokenizer, text.config, f"{path}: text")
    if text.config.projection_dim != image.config.projection_dim:
        raise UserError(f"{path}: its text encoder does not share a space with image_encoder/; name a CLIP")
    name = "the mini model" if Path(path) == MINI else str(path)
    encoder = ImageEncoder(name, image, image_params, clip_preprocessing(image.config.image_size))
    return Clip(encoder, TextEncoder(text, text_params, tokenizer))


def load_clip(name: str) -> Clip:
    """Loads CLIP, as transformers saves a CLIPModel, from a folder or by its name on Hugging Face."""
    folder = locate(name, "clip", TOKENIZER_FILES)
    config = typed_config(folder, "clip", "clip", "a transformers CLIPModel, such as openai/clip-vit-large-patch14")
    path = folder / "config.json"
    nested = convert(config, NestedConfig, str(path), "expected that of a transformers CLIPModel")
    shared = {"projection_dim": nested.projection_dim}
    with told(str(path)):
        text_json = TEXT_DEFAULTS | nested.text_config | shared
        text = CLIPTextModel(from_json(CLIPTextConfig, text_json, {"attention_dropout": 0.0}))
        vision_json = nested.vision_config | shared
        image = CLIPVisionModel(from_json(CLIPVisionConfig, vision_json, {"attention_dropout": 0.0}))
    text_shapes, image_shapes = abstract("text", text), abstract("image", image)
    params = read_weights(folder, rules.CLIP, text_shapes | image_shapes)
    encoder = ImageEncoder(
        name, image, {key: params[key] for key in image_shapes}, clip_preprocessing(image.config.image_size)
    )
    tokenizer = Tokenizer(folder)
    check_tokenizer(tokenizer, text.config, str(folder))
    return Clip(encoder, TextEncoder(text, {key: params[key] for key in text_shapes}, tokenizer))


def load_dino(name: str) -> ImageEncoder:
    """Loads DINO, as transformers saves a ViTModel, from a folder or by its name on Hugging Face."""
    folder = locate(name, "dino")
    config = typed_config(folder, "dino", "vit", "a transformers ViTModel, such as facebook/dino-vits16")
    with told(str(folder / "config.json")):
        module = ViTModel(from_json(ViTConfig, config, VIT_FIXED))
    size = module.config.image_size
    params = read_weights(folder, rules.VIT, shapes_of(module.init, jnp.zeros((1, size, size, 3))))
    return ImageEncoder(name, module, params, dino_preprocessing(size))


def locate(name: str, what: str, files: Sequence[str] = ()) -> AnyPath:
    """Returns the folder of a model's config.json, weights and `files`, which are downloaded if `name` is no folder."""
    folder = expand(name)
    if is_remote(folder):
        patterns = [pattern for form in TORCH_FORMATS for pattern in file_patterns(form, "")]
        return fetch_from_bucket(folder, ["config.json", *files, *patterns])
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or folder.exists():
        raise UserError(f"{what}={name}: no such folder; expected a folder with config.json and model.safetensors")
    for form in TORCH_FORMATS:  # the first one that the model has
        folder = hub.fetch(name, "", ["config.json", *files, *file_patterns(form, "")])
        if find_weights(folder):
            break
    return folder


def typed_config(folder: AnyPath, what: str, kind: str, expected: str) -> dict:
    """Reads a model's config.json. Raises UserError if its model_type is not `kind`."""
    path = folder / "config.json"
    config = read_record(path, dict[str, Any]) if path.is_file() else {}
    if config.get("model_type") != kind:
        found = f"model_type {config.get('model_type')!r}" if path.is_file() else "no such file"
        raise UserError(f"{path}: {found}; {what} expects {expected}, or a folder of one")
    return config


def read_weights(folder: AnyPath, table: list[rules.Rule], expected: Params) -> Params:
    """Reads a folder's weights in float32 onto the default device."""
    form, tensors = open_weights(folder)
    if form.is_flax:
        raise UserError(f"{folder}: only Flax weights; expected model.safetensors or pytorch_model.bin")

    def to_device(part, tensor):
        return jnp.asarray(laid_out(tensor, part.op, np.float32))

    return from_torch(tensors, table, expected, str(folder), to_device)
