"""The training loop: what it needs, and what it does without."""

from dataclasses import replace

import numpy as np
import pytest

from catversion_jax.config import Config
from catversion_jax.data.photos import read_photos
from catversion_jax.training import loop as training_loop
from catversion_jax.training.checkpoints import LocalCheckpoints
from catversion_jax.training.concept_data import prepare
from catversion_jax.training.loop import Outputs, loop
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.step import StepConfig
from tests.cli.test_commands import TEAPOT


def run_loop(model, pipeline, run_dir):
    """Two steps; without what the loop does not need."""
    config = Config().replaced({
        "model.path": str(model), "run_dir": str(run_dir), "concept.class_word": "teapot",
        "adapter.length": 2, "train.steps": 2,
    })  # fmt: skip
    step_config = StepConfig.of(config, pipeline.networks)
    photos = read_photos(str(TEAPOT / "train"), pipeline.networks.resolution)
    data = prepare(config, step_config.method, pipeline, photos)
    needed = {name: pipeline.params[name] for name in ("text", "unet")}
    bare = replace(pipeline, params=needed, tokenizers=())
    run = RunDir(run_dir)
    checkpoints = LocalCheckpoints(run.checkpoints, config.checkpoint.keep)
    state, _ = loop(config, step_config, bare, data, Outputs(run, checkpoints))
    checkpoints.close()
    return state


def test_the_loop_does_without_vae_and_tokenizer(tiny_model, tiny_pipeline, tmp_path, caplog):
    assert int(run_loop(tiny_model, tiny_pipeline, tmp_path).step[0]) == 2
    assert caplog.messages == []


@pytest.mark.parametrize(("norms", "warned"), [((0.0, 0.0), True), ((0.0, 0.1), False)])
def test_a_gradient_of_zero_is_told(tiny_model, tiny_pipeline, tmp_path, caplog, monkeypatch, norms, warned):
    """Whatever the reason, such as a logit bias that leaves the prefix no weight."""
    given = iter(norms)

    def compiled(*_):
        def step(state, *_):
            values = {"loss": 1.0, "learning_rate": 1.0, "grad_norm": next(given)}
            return state.replace(step=state.step + 1), {name: np.full((1, 1), x) for name, x in values.items()}

        return step

    monkeypatch.setattr(training_loop, "compile_chunk", compiled)
    run_loop(tiny_model, tiny_pipeline, tmp_path)
    told = f"{tmp_path}: the gradient was zero in every step, so nothing was learned; check adapter.logit_bias"
    assert caplog.messages == [told] * warned
