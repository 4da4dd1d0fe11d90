"""`catversion bench --vs=torch`: rows for both, and PyTorch's side computes what ours does."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catversion_jax.base.text_states import lower_layers
from catversion_jax.bench import torch_step
from catversion_jax.config import Config
from catversion_jax.utils.errors import UserError
from catversion_jax.weights.source import open_source
from tests.commands import catversion
from tests.conftest import max_error


def test_rows_for_both(tiny_model, tmp_path):
    out = tmp_path / "report.json"
    flags = ["--config=configs/mini.py", f"--config.model.path={tiny_model}", "--sizes=1x2", "--steps=2"]
    catversion("bench", *flags, "--vs=torch", f"--out={out}")
    report = json.loads(out.read_text())
    assert report["torch"] == torch.__version__
    ours, *theirs = report["rows"]
    assert [row["what"] for row in theirs] == list(torch_step.RECIPES)
    for row in theirs:
        assert (row["error"], row["repetitions"]) == (None, ours["repetitions"])
        assert row["images_per_s"] == pytest.approx(2 / row["ms_per_step"] * 1e3)
        assert row["ours_per_theirs"] == pytest.approx(ours["ms_per_step"] / row["ms_per_step"])


def configs_of(model) -> dict[str, dict]:
    source = open_source(str(model))
    return {name: source.config(name) for name in source.components}


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_the_text_states_with_a_prefix_are_ours(bias, tiny_model, tiny_pipeline):
    config = Config().replaced({"adapter.length": 2, "adapter.logit_bias": bias})
    networks, params = tiny_pipeline.networks, tiny_pipeline.params
    method = config.make_method(networks)
    (layers,), (encoder,) = method.layers, networks.text
    rng = np.random.default_rng(0)
    prefix = rng.normal(size=(2, len(layers), 2, *encoder.config.heads)).astype(np.float32)
    ids = rng.integers(encoder.config.vocab_size, size=(3, 77)).astype(np.int32)
    lowered = lower_layers(encoder, params["text"][0], ids, jnp.ones((*ids.shape, 1), bool), stop=layers[0])
    context = jax.jit(lambda prefix: method.condition({"prefix": prefix}, (lowered,), params["text"], networks).states)(
        prefix
    )

    theirs = torch_step.load_module("text", configs_of(tiny_model), tiny_model)
    torch_step.attach(theirs, torch.from_numpy(prefix), layers, bias)
    with torch.no_grad():
        states = theirs(torch.from_numpy(ids).long()).last_hidden_state
    assert max_error(context, states) < 1e-4


@pytest.mark.parametrize("weights", ["own", "random"])
@pytest.mark.parametrize("recipe", torch_step.RECIPES)
def test_a_step_moves_the_prefix(recipe, weights, tiny_model, monkeypatch):
    prefixes = []
    attach = torch_step.attach
    monkeypatch.setattr(torch_step, "attach", lambda *args: prefixes.append(args[1]) or attach(*args))
    folder = tiny_model if weights == "own" else None
    config = Config()
    step = torch_step.make_step(torch_step.RECIPES[recipe], config, configs_of(tiny_model), folder, "cpu", 2)
    (prefix,) = prefixes
    before = prefix.detach().clone()
    losses = [float(step().detach()) for _ in range(2)]
    assert np.isfinite(losses).all()
    moved = (prefix.detach() - before).abs()
    assert 0 < moved.min() <= moved.max() < 3 * config.train.learning_rate


def test_what_cannot_be_compared_is_refused():
    config = Config()
    with pytest.raises(UserError, match="this is a tpu"):
        torch_step.builders(config, {}, None, "tpu", 1)
    with pytest.raises(UserError, match="two text encoders"):
        torch_step.builders(config, {"text_2": {}}, None, "cpu", 1)
