"""Where a base model comes from: a folder, a Hugging Face model or a single file, behind one interface.

`open_source` inspects the files without reading weights; tensors are read one by one, on demand.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import read_text
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import expand, is_remote
from catversion_jax.utils.records import MOST_BYTES, decode, read_record
from catversion_jax.weights import hub, ldm, rules, safetensors, stated, torch_zip
from catversion_jax.weights.bucket_files import fetch_from_bucket, fetch_one
from catversion_jax.weights.foreign import what_folder
from catversion_jax.weights.rules import Rule
from catversion_jax.weights.tensor import Tensor
from catversion_jax.weights.weight_files import FORMATS, file_patterns, find_weights, open_weights

FOLDERS = {
    "text": "text_encoder",
    "text_2": "text_encoder_2",
    "unet": "unet",
    "vae": "vae",
    "image": "image_encoder",
}
"""component -> its folder in diffusers layout. text_2 is SDXL's; image is CLIP's image encoder, used for scores."""

REQUIRED = ("text", "unet", "vae")
DOWNLOADED = (*REQUIRED, "text_2")

RULES = {
    "text": rules.CLIP_TEXT,
    "text_2": rules.CLIP_TEXT,
    "unet": rules.UNET,
    "vae": rules.VAE,
    "image": rules.CLIP_VISION,
}
"""component -> the rules for diffusers' and transformers' names."""

TOKENIZERS = {"text": "tokenizer", "text_2": "tokenizer_2"}
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)

CLIP_TOKENIZER = ("openai/clip-vit-large-patch14", "")
OPEN_CLIP_TOKENIZER = ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer_2")  # the same words, padded with "!"

CHECKPOINTS: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {
    ".safetensors": safetensors.open_safetensors,
}

TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")
CHECKPOINTS |= dict.fromkeys(TORCH_FILES, torch_zip.open_checkpoint)

EXPECTED = "expected a Stable Diffusion 1.x, 2.x or XL model in diffusers layout"


@dataclass(frozen=True)
class ModelComponent:
    """A component: its config.json, its tensors, unread, and the rules for their names."""

    config: dict
    tensors: Mapping[str, Tensor]
    rules: list[Rule] | None


@dataclass(frozen=True)
class Source:
    """A base model whose weights are not read yet."""

    name: str  # for messages
    parts: dict[str, ModelComponent]
    noise: dict
    find_tokenizer: Callable[[str], Path]

    @property
    def components(self) -> tuple[str, ...]:
        """The keys of FOLDERS that the model has."""
        return tuple(self.parts)

    def config(self, component: str) -> dict:
        """The component's config.json, as diffusers or transformers write it."""
        return self.parts[component].config

    def tensors(self, component: str) -> Mapping[str, Tensor]:
        return self.parts[component].tensors

    def rules(self, component: str) -> list[Rule] | None:
        """The rules for the tensors' names; None if names and layouts are Flax's already."""
        return self.parts[component].rules

    def scheduler(self) -> dict:
        """The model's scheduler_config.json, as diffusers writes it."""
        return self.noise

    def tokenizer(self, component: str) -> Path:
        """The folder of a text encoder's vocab.json and merges.txt; for a single file, it may be downloaded first."""
        return self.find_tokenizer(component)


def open_source(path: str, revision: str = "", variant: str = "", prediction_type: str = "") -> Source:
    """Opens a local folder (diffusers layout, or saved by its last Flax pipelines), a single file in the original
    layout, or the Hugging Face model "owner/name".

    `variant` chooses a folder's weights ("fp16": model.fp16.safetensors); `prediction_type` overrides the scheduler's
    config. Raises UserError if `path` is none of these or lacks a component.
    """
    local = expand(path)
    if is_remote(local) and local.is_file():
        local = fetch_one(local)
    if revision and local.exists():
        raise UserError(f"config.model.revision={revision!r}: {local} is local; unset it")
    if variant and local.is_file():
        raise UserError(f"config.model.variant={variant!r}: {local} is a single file; unset it")
    if local.is_file():
        source = open_single_file(local, prediction_type)
    elif is_remote(local) and local.is_dir():
        fetched = fetch_model(path, partial(fetch_from_bucket, local), variant, tuple(FOLDERS))
        source = open_folder(path, fetched, variant, prediction_type)
    elif local.is_dir():
        source = open_folder(path, local, variant, prediction_type)
    elif path.count("/") == 1:
        fetched = fetch_model(path, partial(hub.fetch, path, revision), variant, DOWNLOADED)
        source = open_folder(path, fetched, variant, prediction_type)
    else:
        raise UserError(
            f"{path}: not found; expected a folder, a file or a model's name (owner/name) on {hub.endpoint()}"
        )
    channels = source.config("unet").get("in_channels", 4)
    latents = source.config("vae").get("latent_channels", 4)
    # Values of other types are told when the networks are made.
    if isinstance(channels, int) and isinstance(latents, int) and channels != latents:
        raise UserError(
            f"{path}: the UNet takes {channels} channels, expected the {latents} of latents; it is a model for "
            f"inpainting or editing; give the base model"
        )
    return source


def open_folder(name: str, path: Path, variant: str, prediction_type: str) -> Source:
    """Opens a folder in diffusers layout: one subfolder per component, with config.json and weights."""
    present = [component for component, folder in FOLDERS.items() if (path / folder / "config.json").is_file()]
    missing = [f"{FOLDERS[component]}/config.json" for component in REQUIRED if component not in present]
    if missing:
        raise UserError(f"{name}: {what_folder(path)}no {', no '.join(missing)}; {EXPECTED}")
    plain = [c for c in present if variant and not find_weights(path / FOLDERS[c], variant)]
    if len(plain) == len(present):  # rather a typing error
        plain = []
    if plain:
        folders = ", ".join(FOLDERS[component] for component in plain)
        warn(f"{name}: no weights of config.model.variant={variant!r} in {folders}; the plain ones are read there")

    def part(component: str) -> ModelComponent:
        folder = path / FOLDERS[component]
        form, tensors = open_weights(folder, "" if component in plain else variant)
        config = read_record(folder / "config.json", dict[str, Any], EXPECTED)
        return ModelComponent(config, tensors, None if form.is_flax else RULES[component])

    return Source(
        name=name,
        parts={component: part(component) for component in present},
        noise=read_scheduler(path) | ({"prediction_type": prediction_type} if prediction_type else {}),
        find_tokenizer=lambda component: path / TOKENIZERS[component],
    )


def read_scheduler(path: Path) -> dict[str, Any]:
    """Reads a model's scheduler_config.json."""
    file = path / "scheduler" / "scheduler_config.json"
    # diffusers writes this key, and alone this one, with a value that is no JSON; it means that nothing is clipped.
    text = re.sub(r'("lambda_min_clipped":\s*)-Infinity', r"\1null", read_text(file, MOST_BYTES, EXPECTED))
    config = decode(text, dict[str, Any], str(file), EXPECTED)
    return {key: value for key, value in config.items() if (key, value) != ("lambda_min_clipped", None)}


def fetch_model(repo: str, fetch: Callable[[list[str]], Path], variant: str, components: Sequence[str]) -> Path:
    """Returns the cached folder of a model elsewhere: configs, tokenizers and weights.

    `fetch` copies the files that match its patterns, and returns the folder that they are in.
    PyTorch's pickles, then Flax's files, are downloaded only for components without safetensors; the plain files only
    for components without the variant, of a model that has it.
    """
    files = ["model_index.json", "scheduler/scheduler_config.json"]
    files += [f"{FOLDERS[component]}/config.json" for component in components]
    files += [f"{folder}/{file}" for folder in TOKENIZERS.values() for file in TOKENIZER_FILES]
    every = folders = [FOLDERS[component] for component in components]
    for wanted in dict.fromkeys((variant, "")):
        for form in FORMATS:
            files += [f"{folder}/{pattern}" for folder in folders for pattern in file_patterns(form, wanted)]
            path = fetch(files)
            every = [folder for folder in every if (path / folder / "config.json").is_file()]
            folders = [folder for folder in every if folder in folders and not find_weights(path / folder, wanted)]
            if not folders:
                return path
        if folders == every:
            break
    what = f" of config.model.variant={variant!r}" if variant else ""
    raise UserError(
        f"{repo}: no weights{what} for {', '.join(folders)}; choose another variant, or go online for the rest"
    )


def open_single_file(path: Path, prediction_type: str) -> Source:
    """Opens a single file in the original layout, which has neither configs nor tokenizers."""
    suffix = path.suffix.lower().replace(".sft", ".safetensors")
    if suffix not in CHECKPOINTS:
        raise UserError(f"{path}: expected a .safetensors or .ckpt file, or a folder in diffusers layout")
    tensors = CHECKPOINTS[suffix](path)
    family = ldm.identify(tensors, str(path))
    prediction_type = prediction_type or said_by(path, tensors) or assumed(family, path)
    zero_snr = stated.ZERO_SNR in tensors and prediction_type == "v_prediction"
    if stated.ZERO_SNR in tensors and not zero_snr:
        warn(f"{path}: its tensor {stated.ZERO_SNR} is ignored, because the model is taken as {prediction_type}")
    components = ldm.split(family, tensors)
    try:
        configs = ldm.configs(family, components, prediction_type)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not a whole {family.name} model ({error}); copy or download it again") from error
    return Source(
        name=str(path),
        parts={c: ModelComponent(configs[c], components[c], ldm.rules(family, c, configs[c])) for c in components},
        noise=family.scheduler | {"prediction_type": prediction_type} | (ldm.ZERO_SNR_NOISE if zero_snr else {}),
        find_tokenizer=partial(beside, path.parent, family),
    )


def said_by(path: Path, names: Collection[str]) -> str:
    """The prediction type that a single file states, or ""."""
    metadata = safetensors.read_metadata(path) if path.suffix.lower() in (".safetensors", ".sft") else {}
    return stated.stated_prediction(metadata, names, str(path))


def assumed(family: ldm.Family, path: Path) -> str:
    """The prediction type of a family, where the file does not say; a warning where there are two kinds."""
    if family.is_ambiguous:
        warn(
            f"{path}: does not say what it predicts; taken as {family.prediction_type}, as the larger {family.name} "
            f"models are; if it is a base model for 512 pixels, set config.model.prediction_type=epsilon"
        )
    return family.prediction_type


def beside(folder: Path, family: ldm.Family, component: str) -> Path:
    """The tokenizer of a single file in `folder`: one beside the file, or the one its text encoder was trained with."""
    local = folder / TOKENIZERS[component]
    if local.is_dir():
        return local
    repo, sub_folder = OPEN_CLIP_TOKENIZER if family.texts[component].is_open_clip else CLIP_TOKENIZER
    return hub.fetch(repo, "", [str(Path(sub_folder, file)) for file in TOKENIZER_FILES]) / sub_folder
