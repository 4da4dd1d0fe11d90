"""Every setting and its default, in one place; a file in configs/ changes what it must and says what came of it."""

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict, config_dict

from catversion_jax.adapter import SCOPES
from catversion_jax.catversion import PARTS
from catversion_jax.diffusion import TARGETS
from catversion_jax.errors import UserError
from catversion_jax.method import Method
from catversion_jax.methods import METHODS
from catversion_jax.pipeline import DTYPES, MINI, Networks
from catversion_jax.sampling import SamplerConfig
from catversion_jax.schedulers import SCHEDULERS
from catversion_jax.sharding import FROZEN, make_mesh
from catversion_jax.train_step import DECAYS, OptimizerConfig


def default() -> ConfigDict:
    """The paper's setting, on the embedded mini model. Unset values are "" (text) and None (numbers)."""
    return ConfigDict({
        "run_dir": "",  # where everything is written; required
        "seed": 0,
        "model": {
            "path": "",  # a folder, a single file, or a model's name on Hugging Face; "": the embedded mini model
            "revision": "",  # of a model on Hugging Face; "": its main branch
            "variant": "",  # "fp16" reads the .fp16.safetensors files
            "prediction_type": "",  # epsilon or v_prediction; "": as the model says; v_prediction for a 2.x file
            "dtype": "float32",  # of the text encoder's and the UNet's computation; or bfloat16
        },
        "data": {
            "dir": "",  # a folder of 1 to 100 photos; required
            "masks_dir": "",  # the subject's masks, matched by file stem; "": <dir>/masks where it exists
            "flip": True,  # half of the photos are seen as their mirror image
        },
        "concept": {
            "class_word": "",  # the base class, as you would name it in a prompt; required
            "article": "",  # "": a or an, by the class word's first letter
            "templates": ("a photo of {concept}",),  # training prompts; {concept} is article and class word
            "identifier": "sks",  # of dreambooth and custom_diffusion: the word put before the class word
        },
        "method": "catversion",  # of methods.METHODS: or textual_inversion, dreambooth, custom_diffusion
        "adapter": {  # of catversion
            "layers": (-3, -2, -1),  # text encoder layers; negative: from the last one that reaches the UNet
            "length": 1,  # P, prefix positions per layer
            "init_std": 1.0,
            "logit_bias": 0.0,  # 1 in the authors' files
            "scope": "all",  # or trigger: only from the class word on
            "parts": ("key", "value"),  # or one of them: the other stays 0
        },
        "prior": {  # of dreambooth and custom_diffusion: the base model's own pictures of the class
            "weight": 1.0,  # of the loss on them, beside that on the photos
            "pictures": 200,
        },
        "train": {
            "steps": 1000,
            "batch_size": 2,
            "learning_rate": 1e-2,  # the rate used: nothing multiplies it
            "decay": "constant",  # or linear, cosine
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": config_dict.placeholder(float),  # of the gradient; None: not clipped
            "background_weight": 1.0,  # of what the photos' masks leave out, in the loss; the subject's is 1
            "remat": False,  # compute layers again for the gradient: less memory, more time
            "steps_per_dispatch": config_dict.placeholder(int),  # None: 1 on a CPU, 10 elsewhere
        },
        "stop": {  # early, by a loss on fixed photos, noise and timesteps
            "every": 0,  # steps from one evaluation to the next; 0: none
            "patience": 2,  # evaluations without a lower loss after which a concept stops
            "margin": 0.0,  # share of the lowest loss by which a lower one must be lower to count
        },
        "batch": {
            "slots": 8,  # concepts at once in `catversion batch`
        },
        "mesh": {  # of a process's devices: over concepts and batches as far as these divide evenly, and besides
            "fsdp": 1,  # over so many, a copy of the base model and the batch
            "tensor": 1,  # over so many, a copy of the base model: its channels and heads
            "rules": FROZEN,  # which parameters are split how
        },
        "checkpoint": {"every": 100, "keep": 3},
        "sample": {
            "every": 0,  # validation pictures every N steps; 0: none
            "prompts": ("a photo of {concept} on the beach", "a photo of {concept} in the snow"),
            "scheduler": "",  # of schedulers.SCHEDULERS; "": the one that the model's scheduler_config.json names
            "steps": 50,
            "guidance": 7.5,
            "batch_size": 4,
        },
    })  # fmt: skip


def stable_diffusion(path: str, variant: str = "fp16", method: str = "catversion") -> ConfigDict:
    """A method's published setting on a published model: bfloat16, and prompts to judge the pictures by."""
    if method not in METHODS:
        raise UserError(f"{method}: no such method; expected one of {', '.join(METHODS)}")
    config = default()
    config.method = method
    config.update_from_flattened_dict(METHODS[method].published)
    config.model.path = path
    config.model.variant = variant
    config.model.dtype = "bfloat16"
    config.sample.prompts = JUDGED
    return config


JUDGED = (
    "a photo of {concept} on the beach",
    "a photo of {concept} in the snow",
    "a photo of {concept} in the jungle",
    "a photo of {concept} on a wooden floor",
    "a photo of {concept} at night",
    "a photo of {concept} with a city in the background",
    "a photo of a blue {class_word}",
    "a photo of {concept} wearing a hat",
)
"""Prompts for places, a colour and an accessory."""


def check(config: ConfigDict, without: tuple[str, ...] = ()) -> None:
    """Raise UserError for the first value that cannot work, before anything is read or compiled. Keys in `without` are
    not looked at."""
    rules = [
        ("run_dir", bool(config.run_dir), "expected a folder to write to"),
        ("data.dir", bool(config.data.dir), "expected a folder of photos"),
        ("concept.class_word", bool(config.concept.class_word.strip()), "expected the base class, such as teapot"),
        (
            "model.prediction_type",
            config.model.prediction_type in ("", *TARGETS),
            f"expected one of {', '.join(TARGETS)}",
        ),
        ("model.dtype", config.model.dtype in DTYPES, f"expected one of {', '.join(DTYPES)}"),
        ("method", config.method in METHODS, f"expected one of {', '.join(METHODS)}"),
        ("concept.identifier", bool(config.concept.identifier.strip()), "expected a word, such as sks"),
        ("prior.weight", config.prior.weight >= 0, "expected 0 (none) or more"),
        ("prior.pictures", 1 <= config.prior.pictures <= 10_000, "expected 1 to 10000"),
        (
            "adapter.parts",
            bool(config.adapter.parts) and set(config.adapter.parts) <= set(PARTS),
            f"expected some of {', '.join(PARTS)}",
        ),
        ("adapter.scope", config.adapter.scope in SCOPES, f"expected one of {', '.join(SCOPES)}"),
        ("adapter.length", config.adapter.length >= 1, "expected at least 1"),
        ("adapter.init_std", config.adapter.init_std >= 0, "expected 0 or more"),
        ("train.decay", config.train.decay in DECAYS, f"expected one of {', '.join(DECAYS)}"),
        ("train.steps", config.train.steps >= 1, "expected at least 1"),
        ("train.batch_size", config.train.batch_size >= 1, "expected at least 1"),
        ("train.learning_rate", config.train.learning_rate > 0, "expected more than 0"),
        ("train.background_weight", 0 <= config.train.background_weight <= 1, "expected 0 to 1"),
        ("train.steps_per_dispatch", (config.train.steps_per_dispatch or 1) >= 1, "expected at least 1"),
        ("stop.every", config.stop.every >= 0, "expected 0 (none) or more"),
        ("stop.patience", config.stop.patience >= 1, "expected at least 1"),
        ("stop.margin", 0 <= config.stop.margin < 1, "expected 0 to less than 1"),
        ("batch.slots", config.batch.slots >= 1, "expected at least 1"),
        ("mesh.fsdp", config.mesh.fsdp >= 1, "expected at least 1"),
        ("mesh.tensor", config.mesh.tensor >= 1, "expected at least 1"),
        ("checkpoint.every", config.checkpoint.every >= 1, "expected at least 1"),
        ("checkpoint.keep", config.checkpoint.keep >= 1, "expected at least 1"),
        ("sample.every", config.sample.every >= 0, "expected 0 (none) or more"),
        ("sample.scheduler", config.sample.scheduler in ("", *SCHEDULERS), f"expected one of {', '.join(SCHEDULERS)}"),
        ("sample.steps", 1 <= config.sample.steps <= 1000, "expected 1 to 1000"),
        ("sample.batch_size", config.sample.batch_size >= 1, "expected at least 1"),
        ("seed", 0 <= config.seed < 2**32, "expected 0 to 2^32 - 1"),
        ("concept.templates", bool(config.concept.templates), "expected at least one prompt"),
        ("sample.prompts", bool(config.sample.prompts), "expected at least one prompt"),
    ]
    values = flat(config)
    for key, good, expected in rules:
        if not good and key not in without:
            raise UserError(f"config.{key}={values[key]!r}: {expected}; set --config.{key}=...")
    for template in (*config.concept.templates, *config.sample.prompts):
        fill(template, config.concept.class_word, "a")


def flat(config: ConfigDict) -> dict:
    """Dotted keys and plain values."""
    return {
        f"{key}.{name}" if name else key: inner
        for key, value in config.items()
        for name, inner in (flat(value) if isinstance(value, ConfigDict) else {"": value}).items()
    }


def expand(path: str) -> Path:
    """A path as a shell would read it: flags keep a leading ~."""
    return Path(path).expanduser()


def model_path(config: ConfigDict) -> Path:
    """Where the base model lies, where `model.path` is no name on Hugging Face."""
    return expand(config.model.path) if config.model.path else MINI


def article(class_word: str) -> str:
    return "an" if class_word[:1].lower() in "aeiou" else "a"


def fill(template: str, class_word: str, article: str) -> str:
    """The prompt of a template: {concept} becomes article and class word, {class_word} the word alone."""
    prompt = template.replace("{concept}", f"{article} {class_word}").replace("{class_word}", class_word)
    if "{" in prompt or "}" in prompt:
        raise UserError(f"prompt template {template!r}: the only fields are {{concept}} and {{class_word}}")
    return prompt


def prompts(templates: tuple[str, ...], config: ConfigDict) -> list[str]:
    concept = config.concept
    return [fill(t, concept.class_word, concept.article or article(concept.class_word)) for t in templates]


def method(config: ConfigDict, networks: Networks) -> Method:
    return METHODS[config.method].from_config(config, networks)


def mesh(config: ConfigDict, concepts: int = 1) -> Mesh:
    """The devices of a step of so many concepts."""
    return make_mesh(concepts, config.train.batch_size, config.mesh.fsdp, config.mesh.tensor)


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    names = OptimizerConfig.__dataclass_fields__
    return OptimizerConfig(**{name: config.train[name] for name in names})


def sampler_config(config: ConfigDict) -> SamplerConfig:
    return SamplerConfig(**{name: config.sample[name] for name in SamplerConfig.__dataclass_fields__})
