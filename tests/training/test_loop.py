"""The training loop: what it needs, and what it does without."""

from dataclasses import replace

from catversion_jax.config import Config
from catversion_jax.data.photos import read_photos
from catversion_jax.training.checkpoints import Checkpoints
from catversion_jax.training.concept_data import prepare
from catversion_jax.training.loop import loop
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.step import StepConfig
from tests.cli.test_commands import TEAPOT


def test_the_loop_does_without_vae_and_tokenizer(tiny_model, tiny_pipeline, tmp_path):
    config = Config().replaced({
        "model.path": str(tiny_model), "run_dir": str(tmp_path), "concept.class_word": "teapot",
        "adapter.length": 2, "train.steps": 2,
    })  # fmt: skip
    step_config = StepConfig.of(config, tiny_pipeline.networks)
    photos = read_photos(str(TEAPOT / "train"), tiny_pipeline.networks.resolution)
    data = prepare(config, step_config.method, tiny_pipeline, photos)
    needed = {name: tiny_pipeline.params[name] for name in ("text", "unet")}
    bare = replace(tiny_pipeline, params=needed, tokenizers=())
    run = RunDir(tmp_path)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep)
    state, _ = loop(config, step_config, bare, data, run, checkpoints)
    checkpoints.close()
    assert int(state.step[0]) == 2
