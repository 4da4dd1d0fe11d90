"""What is compared: the rows of each table, and how much is computed for them."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How much is computed for a table."""

    concepts: tuple[str, ...]  # names of folders; if none of them exists: all
    steps: int | None  # of training; None: the config's
    seeds: int  # images of each prompt
    prompts: int  # of config.sample.prompts
    unrelated: int  # of evaluation.UNRELATED


QUICK = Scale(("teapot", "dog"), 150, 2, 4, 3)
FULL = Scale((), None, 2, 8, 3)
FULL_ABLATION = Scale(("teapot", "dog", "backpack", "robot"), None, 2, 8, 3)
TOGETHER = Scale((), None, 2, 8, 0)
QUICK_TOGETHER = Scale(("teapot", "backpack", "rocket"), None, 2, 4, 0)

TRIED_ON = QUICK.concepts
"""Concepts by which a method's learning rate is chosen; the others are trained at the best rate only."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A way to train, as changes to the config."""

    group: str
    name: str
    changes: dict[str, object]

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
    "textual_inversion": (3e-4, 1e-3),
    "dreambooth": (3e-5, 1e-4),
    "custom_diffusion": (1e-4, 3e-4),
}
"""Learning rates at which each method is tried. The published ones are for a UNet 64 times as large and for more steps.
These come from a few runs on the teapot: at rates three times lower they learn little, at higher ones they forget the
prompt."""

BASELINES = tuple(
    Setting(method, f"rate {rate:g}", {"method": method, "train.learning_rate": rate})
    for method, rates in RATES.items()
    for rate in rates
)

BASE = Setting("base model", "", {})
CONFIG = Setting("config", "configs/mini.py", {})
ABLATION = (
    CONFIG,
    Setting("layers", "first three", {"adapter.layers": (0, 1, 2)}),
    Setting("layers", "middle three", {"adapter.layers": (4, 5, 6)}),
    Setting("layers", "all", {"adapter.layers": tuple(range(12))}),
    Setting("layers", "the last one", {"adapter.layers": (-1,)}),
    Setting("parts", "keys only", {"adapter.parts": ("key",)}),
    Setting("parts", "values only", {"adapter.parts": ("value",)}),
    Setting("length", "P = 1", {"adapter.length": 1}),
    Setting("length", "P = 2", {"adapter.length": 2}),
    Setting("length", "P = 8", {"adapter.length": 8}),
    Setting("init", "standard deviation 0.01", {"adapter.init_std": 0.01}),
    Setting("init", "standard deviation 1", {"adapter.init_std": 1.0}),
    Setting("logit bias", "1", {"adapter.logit_bias": 1.0}),
    Setting("scope", "all", {"adapter.scope": "all"}),
    Setting("class word", "none in training, scope all", {"adapter.scope": "all", "concept.templates": ("a photo",)}),
    Setting("background", "weight 0 in the loss", {"train.background_weight": 0.0}),
)
"""Each row changes one thing in the config, or two if one makes no sense alone: without the class word in the training
prompt, no token sees a prefix of scope `trigger`."""
