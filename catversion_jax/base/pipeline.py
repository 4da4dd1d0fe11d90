"""A base model: its networks (static, hashable) and its parameters (arrays on the device)."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from catversion_jax.base.noise_schedule import TARGETS, NoiseSchedule
from catversion_jax.base.schedulers import check_options
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from catversion_jax.models.sharding import Rules, param_shardings
from catversion_jax.models.unet import UNet2DConditionModel, UNetConfig
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.utils import tree
from catversion_jax.utils.errors import UserError, told
from catversion_jax.utils.json_config import from_json
from catversion_jax.utils.paths import AnyPath, expand
from catversion_jax.utils.settings import ANY_TEXT, one_of, setting
from catversion_jax.utils.types import Params
from catversion_jax.weights import weight_cache
from catversion_jax.weights.conversion import Target, collect, readers, shapes_of, submit
from catversion_jax.weights.source import Source, open_source

MINI = Path(__file__).parents[1] / "mini"
"""The small Stable Diffusion in this package: the default if no other model is named."""

BLOCK = 64
"""Columns of a transposed tensor that `laid_out` copies at a time."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def drawing_dtype() -> str:
    """Returns the dtype that pictures are drawn in if none is named: a CPU is slower in bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclass(frozen=True)
class ModelConfig:
    """Which base model to load, and how."""

    path: str = setting(
        "", 'Base model: a folder, a single file or a name on Hugging Face; "" means the embedded mini model.', ANY_TEXT
    )
    revision: str = setting("", 'Revision of a model on Hugging Face; "" means its main branch.', ANY_TEXT)
    variant: str = setting(
        "", 'Variant of the weight files: "fp16" reads .fp16.safetensors, "" the plain files.', ANY_TEXT
    )
    prediction_type: str = setting(
        "",
        f'What the UNet predicts: {" or ".join(TARGETS)}; "" means as the model says; '
        "a file that does not say counts as v_prediction if it is 2.x, else epsilon.",
        one_of(TARGETS, unset=True),
    )
    dtype: str = setting(
        "float32", f"Dtype of the text encoder and the UNet: one of {', '.join(DTYPES)}.", one_of(DTYPES)
    )

    @property
    def folder(self) -> AnyPath:
        """The model's local path, unless `path` is a name on Hugging Face."""
        return expand(self.path) if self.path else MINI


@dataclass(frozen=True)
class Networks:
    """The base model's networks and noise schedule: its static part under `jax.jit`."""

    text: tuple[CLIPTextModel, ...]  # two in SDXL
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    schedule: NoiseSchedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return size, size, self.unet.config.in_channels

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Number and size of each text encoder's attention heads: (H, D) of its prefix."""
        return tuple(text.config.heads for text in self.text)

    @property
    def resolution(self) -> int:
        """Pixels along each side of an image."""
        return self.unet.config.sample_size * self.vae.config.downscale


@dataclass(frozen=True, eq=False)  # compared by identity, not by parameters
class BasePipeline:
    """A loaded base model. `params` has the keys text (one tree per text encoder), unet and vae."""

    networks: Networks
    params: dict[str, Any]
    tokenizers: tuple[Tokenizer, ...]  # one per text encoder
    fingerprint: str  # of the text encoders' weights

    @property
    def tokenizer(self) -> Tokenizer:
        """The first tokenizer: SDXL's second one gives words the same tokens and differs only in the padding."""
        return self.tokenizers[0]


def read_text_config(config: dict, dtype) -> CLIPTextConfig:
    """Reads a text encoder's config.json."""
    # The file always has projection_dim; only `architectures` tells whether the weights have a projection.
    projects = "CLIPTextModelWithProjection" in str(config.get("architectures"))
    changes = {"projection_dim": config.get("projection_dim", 512) if projects else None}
    return from_json(CLIPTextConfig, config | changes, {"attention_dropout": 0.0}, dtype=dtype)


class NetworkSpec(NamedTuple):
    """How to make a network, and the inputs that shape its parameters."""

    make: Callable[[dict, Any], Any]  # (config.json, dtype) -> module
    inputs: Callable[[Any], tuple]  # module -> the inputs its `init` traces


TEXT = NetworkSpec(
    lambda config, dtype: CLIPTextModel(read_text_config(config, dtype)),
    lambda m: (jnp.zeros((1, m.config.max_position_embeddings), jnp.int32),),
)
COMPONENTS = {
    "text": TEXT,
    "text_2": TEXT,
    "unet": NetworkSpec(
        lambda config, dtype: UNet2DConditionModel(UNetConfig.from_json(config, dtype=dtype)),
        lambda m: (
            jnp.zeros((1, m.config.sample_size, m.config.sample_size, m.config.in_channels)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 77, m.config.cross_attention_dim)),
            m.config.pooled_dim and jnp.zeros((1, m.config.pooled_dim)),
        ),
    ),
    "vae": NetworkSpec(
        lambda config, dtype: AutoencoderKL(VAEConfig.from_json(config, dtype=dtype)),
        lambda m: (jnp.zeros((1, m.config.downscale * 8, m.config.downscale * 8, m.config.in_channels)),),
    ),
    "image": NetworkSpec(
        lambda config, dtype: CLIPVisionModel(
            from_json(CLIPVisionConfig, config, {"attention_dropout": 0.0}, dtype=dtype)
        ),
        lambda m: (jnp.zeros((1, m.config.image_size, m.config.image_size, 3)),),
    ),
}


@cache  # tracing a network takes about a second, and each concept of DreamBooth asks again
def declared_shapes(name: str, module) -> Params:
    """The shapes of a component's parameters, as its modules declare them."""
    return shapes_of(module.init, *COMPONENTS[name].inputs(module))


def abstract(name: str, module, dtype=jnp.float32, mesh: Mesh | None = None, rules: Rules = ()) -> Params:
    """The shapes of a component's parameters in `dtype`, each with its sharding."""
    shapes = declared_shapes(name, module)

    def shape(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree.map(shape, shapes, param_shardings(shapes, mesh, rules))


def laid_out(tensor: np.ndarray, op: Callable, dtype: Any) -> np.ndarray:
    """Returns a file's tensor in our layout and dtype."""
    view = op(tensor)
    # In the float16 of digests, large values become inf, which is no error.
    with np.errstate(over="ignore"):
        if view.flags.c_contiguous:
            return view.astype(dtype)
        # A transposed view is copied in blocks of columns that stay in the processor's cache: casting first and then
        # transposing the whole takes twice as long, a cast that transposes six times (docs/performance.md).
        out = np.empty(view.shape, dtype)
        for start in range(0, view.shape[-1], BLOCK):
            out[..., start : start + BLOCK] = view[..., start : start + BLOCK].astype(dtype)
        return out


def make_network(source: Source, name: str, dtype=jnp.float32) -> Any:
    """Makes the module that a component's config.json describes. Raises UserError, naming the model, for another."""
    with told(f"{source.name}: {name}"):
        return COMPONENTS[name].make(source.config(name), dtype)


def load_component(source: Source, name: str, dtype=jnp.float32) -> tuple[Any, Params]:
    """Loads one network of a model, with its parameters in `dtype` on the default device."""
    module = make_network(source, name, dtype)
    with readers() as pool:
        return module, collect(begin(pool, source, name, abstract(name, module, dtype)))


def begin(
    pool: Executor, source: Source, name: str, shapes: Params, digests: dict[str, bytes] | None = None
) -> list[Future]:
    """Starts to read a component's parameters in the dtypes and shardings of `shapes`, from the file to the devices.

    Adds the digest of each parameter, as the file has it, to `digests`. Raises UserError if the weights do not fit the
    network.
    """
    expected = flatten_dict(shapes, sep="/")

    def put_on_device(part: Target, tensor: np.ndarray) -> jax.Array:
        if digests is not None:
            digests[f"{name}/{part.path}"] = tree.digest(laid_out(tensor, part.op, np.float16))
        leaf = expected[part.path]
        return jax.device_put(laid_out(tensor, part.op, leaf.dtype), leaf.sharding)

    return submit(pool, source.tensors(name), source.rules(name), shapes, f"{source.name}: {name}", put_on_device)


def model_source(model: ModelConfig) -> Source:
    """Opens the base model that the config names; its tensors are not read yet."""
    return open_source(model.path or str(MINI), model.revision, model.variant, model.prediction_type)


def resolution_of(model: ModelConfig) -> int:
    """Returns the pixels along each side of a base model's images, by its config files alone."""
    source = model_source(model)
    return make_network(source, "unet").config.sample_size * make_network(source, "vae").config.downscale


def check_tokenizer(tokenizer: Tokenizer, text: CLIPTextConfig, where: str) -> None:
    """Raises UserError if a prompt could have a token id, or a position, that the text encoder has no embedding for."""
    path, size = tokenizer.vocabulary.path, tokenizer.vocabulary.size
    todo = "take the tokenizer and the text encoder of one model"
    if size > text.vocab_size:
        raise UserError(f"{path}: {size} token ids, but {where}'s config.json has vocab_size={text.vocab_size}; {todo}")
    if tokenizer.length > text.max_position_embeddings:
        raise UserError(
            f"{path.parent / 'tokenizer_config.json'}: model_max_length={tokenizer.length}, but {where}'s config.json "
            f"has max_position_embeddings={text.max_position_embeddings}; {todo}"
        )
    # 2 stands for the largest id (models/clip.py); an id that no prompt holds would pool the wrong position.
    if text.projection_dim is not None and text.eos_token_id not in (2, tokenizer.end):
        raise UserError(
            f"{path}: the end token is {tokenizer.end}, but {where}'s config.json has eos_token_id="
            f"{text.eos_token_id}; {todo}"
        )


def check_conditioning(unet: UNetConfig, texts: Sequence[CLIPTextConfig], where: str) -> None:
    """Raises UserError unless the UNet takes what the text encoders give."""
    width = sum(text.hidden_size for text in texts)
    if unet.cross_attention_dim != width:
        raise UserError(
            f"{where}: the UNet takes text states of {unet.cross_attention_dim} channels, but the text encoder gives "
            f"{width}; take all parts of one model"
        )
    pooled = texts[-1].projection_dim if len(texts) > 1 else None
    if unet.pooled_dim != pooled and unet.addition_embed_type is not None:
        raise UserError(
            f"{where}: the UNet takes a pooled embedding of {unet.pooled_dim} channels, but the last of {len(texts)} "
            f"text encoders gives {pooled or 'none'}; take all parts of one model"
        )


def load_pipeline(model: ModelConfig = ModelConfig(), mesh: Mesh | None = None, rules: Rules = ()) -> BasePipeline:
    """Loads a Stable Diffusion 1.x, 2.x or XL model from wherever `source.open_source` finds it.

    `model.dtype` is the dtype of the text encoders' and the UNet's weights and computation; the VAE's weights are
    float32, and so is its encoder. The parameters are placed on the devices of `mesh`, split by `rules` (see
    sharding.FROZEN), or on the default device if there is no mesh.
    """
    source = model_source(model)
    texts = [name for name in ("text", "text_2") if name in source.components]
    tokenizers = tuple(Tokenizer(source.tokenizer(name)) for name in texts)
    with told(source.name):
        schedule = NoiseSchedule.from_json(source.scheduler())
        check_options(schedule)
    # What the encoder gives is trained on, and it runs only a few times.
    dtypes = {name: jnp.float32 if name == "vae" else DTYPES[model.dtype] for name in (*texts, "unet", "vae")}
    modules = {name: make_network(source, name, dtypes[name]) for name in dtypes}
    for name, tokenizer in zip(texts, tokenizers, strict=True):
        check_tokenizer(tokenizer, modules[name].config, f"{source.name}: {name}")
    check_conditioning(modules["unet"].config, [modules[name].config for name in texts], source.name)

    def shapes(name: str) -> Params:
        return abstract(name, modules[name], dtypes[name], mesh, rules)

    def convert() -> tuple[dict[str, Params], str]:
        digests: dict[str, bytes] = {}
        # The UNet, by far the largest, comes first: while threads read it, the others are traced for their shapes.
        with readers() as pool:
            reading = {
                name: begin(pool, source, name, shapes(name), digests if name in texts else None)
                for name in ("unet", "vae", *texts)
            }
            return {name: collect(futures) for name, futures in reading.items()}, tree.fingerprint(digests)

    params, fingerprint = weight_cache.read_or_convert(source, dtypes, shapes, convert)
    encoders, unet, vae = tuple(modules[name] for name in texts), modules["unet"], modules["vae"]
    # Not in any config.json: SDXL's UNet takes the penultimate layer of both encoders, and the model's resolution.
    if len(encoders) > 1:
        encoders = tuple(CLIPTextModel(replace(encoder.config, skip=1)) for encoder in encoders)
    resolution = unet.config.sample_size * vae.config.downscale
    unet = UNet2DConditionModel(replace(unet.config, resolution=resolution))
    return BasePipeline(
        networks=Networks(encoders, unet, vae, schedule),
        params={"text": tuple(params[name] for name in texts), "unet": params["unet"], "vae": params["vae"]},
        tokenizers=tokenizers,
        fingerprint=fingerprint,
    )
