"""The public command on a full-size model: loaded, trained, sampled, its memory counted, its UNet against PyTorch."""

import resource
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from catversion_jax.base import pipeline
from catversion_jax.methods import concept_file
from catversion_jax.models.unet import UNet2DConditionModel
from catversion_jax.weights.source import open_source
from tests.commands import ROOT, command

MOST_BYTES = 20 * 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Written by a process of its own, so that none of PyTorch's memory is counted."""
    folder = tmp_path_factory.mktemp("sd15")
    subprocess.run([sys.executable, "-m", "tests.full_size.write", folder], cwd=ROOT, check=True)
    return folder


def test_unet(model):
    module, params = pipeline.load_component(open_source(str(model), variant="fp16"), "unet")
    assert isinstance(module, UNet2DConditionModel)
    arrays = np.load(model / "unet.npz")
    out = jax.jit(module.apply)({"params": params}, arrays["latents"], arrays["timesteps"], arrays["context"])
    error = np.abs(out - arrays["expected"]).max() / np.abs(arrays["expected"]).max()
    print(f"relative max error {error:.1e}")
    assert error <= 1e-3


def test_train_and_sample(model, tmp_path):
    values = {
        "model.path": model,
        "model.dtype": "float32",
        "data.dir": ROOT / "catversion_jax" / "concepts" / "teapot" / "train",
        "data.flip": False,
        "concept.class_word": "teapot",
        "run_dir": tmp_path / "run",
        "train.steps": 2,
        "train.batch_size": 1,
        "sample.steps": 2,
        "sample.batch_size": 1,
        "sample.prompts": "'a photo of a {class_word}',",
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    start = time.monotonic()
    subprocess.run(command("train", "--config=configs/sd15.py", *flags), cwd=ROOT, check=True)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{time.monotonic() - start:.0f} s, at most {most / 2**30:.1f} GiB")
    assert concept_file.load(tmp_path / "run").learned["prefix"].shape == (1, 3, 2, 12, 64)
    assert Image.open(tmp_path / "run" / "samples.png").width > 512
    assert most < MOST_BYTES
