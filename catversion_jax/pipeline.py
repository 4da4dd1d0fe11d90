"""A base model in diffusers layout: its networks (static, hashable) and its parameters (arrays)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax import tree
from catversion_jax.convert import rules
from catversion_jax.convert.safetensors import open_tensors
from catversion_jax.convert.torch import from_torch, shapes_of
from catversion_jax.diffusion import NoiseSchedule
from catversion_jax.errors import UserError
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from catversion_jax.models.config import from_json
from catversion_jax.models.unet import UNet2DConditionModel, UNetConfig
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.text import Tokenizer
from catversion_jax.types import Params

MINI = Path(__file__).parent / "mini"
"""The embedded small Stable Diffusion: the default wherever no other model is named."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Networks:
    """What is static under `jax.jit`."""

    text: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    schedule: NoiseSchedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return size, size, self.unet.config.in_channels

    @property
    def resolution(self) -> int:
        """Pixels along each side of a picture."""
        return self.unet.config.sample_size * self.vae.config.downscale


@dataclass(frozen=True)
class Pipeline:
    """A loaded base model. `params` has the keys text, unet and vae; arrays on the default device."""

    networks: Networks
    params: dict[str, Params]
    tokenizer: Tokenizer
    fingerprint: str  # of the text encoder's weights


def text_config(config: dict, dtype) -> CLIPTextConfig:
    """The field projection_dim is always there; whether the weights are, `architectures` tells."""
    projects = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
    fixed = {"attention_dropout": 0.0}
    return from_json(
        CLIPTextConfig, config | {"projection_dim": config["projection_dim"] if projects else None}, fixed, dtype=dtype
    )


class Component(NamedTuple):
    """One sub-folder of a diffusers pipeline."""

    folder: str
    make: Callable[[dict, Any], Any]  # (config.json, dtype) -> module
    rules: list[rules.Rule]
    inputs: Callable[[Any], tuple]  # module -> the inputs its `init` traces


COMPONENTS = {
    "text": Component(
        "text_encoder",
        lambda config, dtype: CLIPTextModel(text_config(config, dtype)),
        rules.CLIP_TEXT,
        lambda m: (jnp.zeros((1, m.config.max_position_embeddings), jnp.int32),),
    ),
    "unet": Component(
        "unet",
        lambda config, dtype: UNet2DConditionModel(UNetConfig.from_json(config, dtype=dtype)),
        rules.UNET,
        lambda m: (
            jnp.zeros((1, m.config.sample_size, m.config.sample_size, m.config.in_channels)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 77, m.config.cross_attention_dim)),
        ),
    ),
    "vae": Component(
        "vae",
        lambda config, dtype: AutoencoderKL(VAEConfig.from_json(config, dtype=dtype)),
        rules.VAE,
        lambda m: (jnp.zeros((1, m.config.downscale * 8, m.config.downscale * 8, m.config.in_channels)),),
    ),
    "image": Component(
        "image_encoder",
        lambda config, dtype: CLIPVisionModel(
            from_json(CLIPVisionConfig, config, {"attention_dropout": 0.0}, dtype=dtype)
        ),
        rules.CLIP_VISION,
        lambda m: (jnp.zeros((1, m.config.image_size, m.config.image_size, 3)),),
    ),
}


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; expected a Stable Diffusion model in diffusers layout") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def abstract(name: str, module) -> Params:
    """The shapes of a component's parameters."""
    return shapes_of(module.init, *COMPONENTS[name].inputs(module))


def load_component(model: Path, name: str, dtype=jnp.float32, variant: str | None = None) -> tuple[Any, Params]:
    """One network of a diffusers folder and its parameters as float32 numpy arrays.

    Raises UserError where the folder, its config or its weights are not what the network needs.
    """
    component = COMPONENTS[name]
    folder = model / component.folder
    module = component.make(read_json(folder / "config.json"), dtype)
    params = from_torch(open_tensors(folder, variant), component.rules, abstract(name, module), str(folder))
    return module, tree.cast(params, np.float32)


def load(model: str | Path | None = None, dtype: str = "float32", variant: str | None = None) -> Pipeline:
    """A Stable Diffusion 1.x or 2.x model from a local folder in diffusers layout; None is the embedded mini model.

    `dtype` (a key of DTYPES) is that of the text encoder's and the UNet's computation; the VAE's is always float32:
    it runs a few times, and half precision is known to overflow in it.
    """
    model = MINI if model is None else Path(model).expanduser()
    if not model.is_dir():
        raise UserError(f"{model}: no such folder; model.path takes a local Stable Diffusion model in diffusers layout")
    compute = {"text": DTYPES[dtype], "unet": DTYPES[dtype], "vae": jnp.float32}
    loaded = {name: load_component(model, name, dtype, variant) for name, dtype in compute.items()}
    modules = {name: module for name, (module, _) in loaded.items()}
    return Pipeline(
        networks=Networks(
            **modules, schedule=NoiseSchedule.from_json(read_json(model / "scheduler" / "scheduler_config.json"))
        ),
        params={name: jax.device_put(tree.cast(params, compute[name])) for name, (_, params) in loaded.items()},
        tokenizer=Tokenizer(model / "tokenizer"),
        fingerprint=tree.fingerprint(loaded["text"][1]),
    )
