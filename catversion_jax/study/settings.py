"""What is compared: the rows of each table, and how much is computed for them."""

import re
from dataclasses import dataclass

from catversion_jax.config.sections import SampleConfig, TrainConfig
from catversion_jax.data.prompts import ConceptConfig


@dataclass(frozen=True)
class Scale:
    """How much is computed for a table."""

    concepts: tuple[str, ...]  # names of folders; if none of them exists: all
    steps: int | None  # of training; None: the config's
    seeds: int  # images of each prompt
    prompts: int  # of config.sample.prompts
    unrelated: int  # of evaluation.UNRELATED


STRENGTHS = (0.5, 0.7, 1.0)
"""Strengths at which each candidate is tried."""

CURVE = (0.2, 0.35, 0.5, 0.7, 1.0, 1.4)
"""Strengths of the figure of text against image alignment; one image of each prompt is sampled at each."""

QUICK = Scale(("teapot", "dog"), 150, 2, 4, 3)
FULL = Scale((), None, 2, 8, 3)
FULL_ABLATION = Scale(("teapot", "backpack", "robot"), None, 2, 8, 3)
TOGETHER = Scale((), None, 2, 8, 0)
QUICK_TOGETHER = Scale(("teapot", "backpack", "rocket"), None, 2, 4, 0)

TRIED_ON = QUICK.concepts
"""Concepts by which a method's rate, timesteps and strength are chosen; the others are trained at the best only."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A way to train, as changes to the config."""

    group: str
    name: str
    changes: dict[str, object]
    strength: float | None = None  # that its images are sampled at; None: the config's

    @property
    def folder(self) -> str:
        """The name of its folder in a study's folder."""
        return "-".join(re.sub(r"[^\w.]+", "-", part) for part in (self.group, self.name))

    @property
    def title(self) -> str:
        """Its label in an image grid."""
        return f"{self.group} {self.name}".replace("_", " ")


RATES = {
    "catversion": (0.0125, 0.025),
    "textual_inversion": (1e-3, 2e-3),
    "dreambooth": (3e-5, 6e-5),
    "custom_diffusion": (1e-4, 2e-4),
}
"""Learning rates at which each method is tried: the one that did better in 400 steps, and twice that for half the
steps. The published ones are for a UNet 64 times as large and for more steps."""

TIMESTEPS = {"noisy timesteps": (0.65, 1.0), "all timesteps": (0.0, 1.0)}
"""Ranges of timesteps at which each method is tried."""

UNTUNED = {
    "train.text_penalty": TrainConfig.text_penalty,
    "concept.templates": ConceptConfig.templates,
    "sample.strength": SampleConfig.strength,
}
"""What configs/mini.py has for CatVersion alone, as the baselines have it."""

BASELINES = tuple(
    Setting(
        method,
        f"rate {rate:g}, {name}",
        {"method": method, "train.learning_rate": rate, "train.timesteps": part}
        | ({} if method == "catversion" else UNTUNED),
    )
    for method, rates in RATES.items()
    for rate in rates
    for name, part in TIMESTEPS.items()
)

BASE = Setting("base model", "", {}, strength=0.0)
"""Scored as a concept at strength 0: with the same prompts, seeds and masks."""
CONFIG = Setting("config", "configs/mini.py", {})
ABLATION = (
    CONFIG,
    Setting("timesteps", "all", {"train.timesteps": (0.0, 1.0)}),
    Setting("timesteps", "the noisy half", {"train.timesteps": (0.5, 1.0)}),
    Setting("text penalty", "none", {"train.text_penalty": TrainConfig.text_penalty}),
    Setting("prompts", "one", {"concept.templates": ConceptConfig.templates}),
    Setting("strength", "as trained", {}, strength=1.0),
    Setting("strength", "0.5", {}, strength=0.5),
    Setting("strength", "0.35", {}, strength=0.35),
    Setting("layers", "first three", {"adapter.layers": (0, 1, 2)}),
    Setting("layers", "all", {"adapter.layers": tuple(range(12))}),
    Setting("parts", "keys only", {"adapter.parts": ("key",)}),
    Setting("parts", "values only", {"adapter.parts": ("value",)}),
    Setting("length", "P = 1", {"adapter.length": 1}),
    Setting("scope", "all", {"adapter.scope": "all"}),
    Setting("class word", "none in training, scope all", {"adapter.scope": "all", "concept.templates": ("a photo",)}),
    Setting("background", "weight 0 in the loss", {"train.background_weight": 0.0}),
)
"""Each row changes one thing in the config, or two if one makes no sense alone: without the class word in the training
prompt, no token sees a prefix of scope `trigger`."""
