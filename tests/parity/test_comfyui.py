"""Prompts as ComfyUI reads them: weights, and more tokens than the text encoder takes."""

import numpy as np
import pytest

from catversion_jax.sampling import conditioning
from tests import tiny
from tests.conftest import max_error
from tests.parity import comfyui

LONG = "a photo of a teapot on the beach, " * 12
PROMPTS = [
    "a photo of a teapot",
    "a (red:1.3) teapot",
    "a (red) ((teapot)) [on] the (beach:0.4)",
    "(a (red:1.5) teapot on (the beach)) in snow",
    r"a teapot \(red\), (blue \(dark\):1.2)",
    "a teapot) (red:1.3) (blue",
    "((a teapot)",
    "(:1.2) (teapot:) (red:1.2:1.4) (blue: -0.5)",
    "(a teapot:nothing) () (snow:1e-1)",
    "",
    LONG,
    f"{LONG} (red:1.3) {LONG}",
    "a (red:1.1) teapot, " * 25,
    "word " * 71 + "(on the beach in snow:1.2)",
    "word " * 75,
    "word " * 74 + "(teapot:0.9)",
    "(:1.5)" * 3,
    "a\nteapot (in\n\nsnow:1.3)",
    "(" * 30 + "teapot" + ")" * 29,
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def xl_model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("xl"), changes=tiny.XL_CHANGES)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts(tiny_model, xl_model, kind):
    model = {"sd": tiny_model, "sdxl": xl_model}[kind]
    clip = {"sd": comfyui.sd_clip, "sdxl": comfyui.sdxl_clip}[kind](model)
    pipeline = tiny.load(model)
    for prompt in PROMPTS:
        states, pooled = comfyui.encode(clip, prompt)
        ours = conditioning.context(pipeline, [prompt])
        assert ours.states.shape == states.shape, prompt
        assert max_error(ours.states, states) < TOLERANCE * max(1, np.abs(states.numpy()).max()), prompt
        if kind == "sdxl":
            assert max_error(ours.pooled, pooled) < TOLERANCE, prompt
