"""Two text encoders: a prefix in each, both reached by the gradient, and the prompt's embedding for the UNet."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from catversion_jax.base.pipeline import MINI
from catversion_jax.methods import concept_file
from catversion_jax.sampling import conditioning
from tests import tiny
from tests.commands import catversion, error_of

TEAPOT = MINI.parent / "concepts" / "teapot" / "train"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its weights are a variant, which the concept has to remember."""
    folder = tiny.write(tmp_path_factory.mktemp("sdxl"), changes=tiny.XL_CHANGES)
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    return folder


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sdxl-run") / "run"
    values = {
        "model.path": model,
        "model.variant": "fp16",
        "data.dir": TEAPOT,
        "concept.class_word": "teapot",
        "run_dir": run_dir,
        "adapter.init_std": 0.1,
        "train.steps": 3,
        "train.batch_size": 1,
        "train.learning_rate": 0.05,
        "sample.every": 0,
        "sample.steps": 2,
        "sample.batch_size": 1,
        "sample.prompts": "'a photo of a {class_word}',",
    }
    catversion("train", "--config=configs/mini.py", *(f"--config.{key}={value}" for key, value in values.items()))
    return run_dir


def test_the_networks(model):
    networks = tiny.load(model, variant="fp16").networks
    assert [text.config.depth for text in networks.text] == [3, 3]
    assert networks.heads == ((2, 16), (3, 16))
    assert networks.unet.config.time_ids(8, 4) == (16, 8, 0, 0, 16, 8)


def test_both_prefixes_are_learned_and_stored(model, learned):
    concept = concept_file.load(learned)
    assert tuple(prefix.shape for prefix in concept.learned.values()) == ((4, 3, 2, 2, 16), (4, 3, 2, 3, 16))
    assert concept.method.layers == ((0, 1, 2), (0, 1, 2))
    pipe = tiny.load(model, variant="fp16")
    base, moved = (conditioning.condition(pipe, ["a teapot"], concept.at(strength)) for strength in (0.0, 1.0))
    untouched = conditioning.condition(pipe, ["a teapot"])
    np.testing.assert_allclose(base.states, untouched.states, atol=1e-5)
    np.testing.assert_allclose(base.pooled, untouched.pooled, atol=1e-5)
    change = np.abs(np.asarray(moved.states - base.states)).max(axis=(0, 1))
    assert change[:32].max() > 1e-3  # the first encoder's half
    assert change[32:].max() > 1e-3  # the second one's
    assert np.abs(np.asarray(moved.pooled - base.pooled)).max() > 1e-4


def test_generate(model, learned, tiny_model, tmp_path):
    flags = ["--prompt=a teapot", "--num=1", "--steps=2", "--batch_size=1", f"--out={tmp_path}"]
    catversion("generate", f"--embedding={learned}", *flags)
    assert len([*tmp_path.glob("a-teapot_*_0.png")]) == 1
    message = error_of("generate", f"--embedding={learned}", f"--model={tiny_model}", *flags)
    assert "a concept works only with the base model it was learned on" in message


def test_export(learned, tmp_path):
    catversion("export", f"--embedding={learned}", "--prompt=a teapot", "--prompt=a car", f"--out={tmp_path}")
    embeds = load_file(tmp_path / "prompt_embeds.safetensors")
    shapes = {name: array.shape for name, array in embeds.items()}
    states, pooled = (2, 77, 80), (2, 24)
    assert shapes == {
        "prompt_embeds": states,
        "negative_prompt_embeds": states,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": pooled,
    }
    assert not np.array_equal(embeds["prompt_embeds"][0], embeds["negative_prompt_embeds"][0])
    assert concept_file.load(tmp_path / "teapot.safetensors").learned.keys() == {"prefix", "prefix_2"}
