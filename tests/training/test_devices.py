"""Meshes of several devices: the same numbers as one device's, and no more talk between devices than is needed."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from catversion_jax.models.sharding import FROZEN, make_mesh, spec
from catversion_jax.utils.errors import UserError
from tests.commands import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("devices") / "out.npz"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.eight_devices", tiny_model, out],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


@pytest.mark.parametrize(
    ("case", "mesh"),
    [("whole8", [8, 1, 1, 1]), ("whole2", [2, 4, 1, 1]), ("fsdp2", [2, 1, 4, 1]), ("tensor2", [2, 2, 1, 2])],
)
def test_the_numbers_are_those_of_one_device(results, case, mesh):
    assert results[f"{case} mesh"].tolist() == mesh
    np.testing.assert_allclose(results[f"{case} losses"][:, :2], results["one2 losses"], rtol=1e-5)
    np.testing.assert_allclose(results[f"{case} prefix"][:2], results["one2 prefix"], atol=1e-4)


def test_concepts_share_nothing(results):
    assert results["whole8 collectives"].tolist() == []


def test_a_split_batch_sums_gradients_alone(results):
    assert results["whole2 collectives"].tolist() == ["all-reduce"]


def test_a_split_base_model_is_gathered_where_it_is_used(results):
    assert "all-gather" in results["fsdp2 collectives"]
    assert "all-reduce" in results["tensor2 collectives"]
    assert results["whole2 held"] == 1
    assert results["fsdp2 held"] < 0.3  # of 4 devices; what cannot be divided is whole on each
    assert results["tensor2 held"] < 0.8  # attention and convolutions are split in 2, the feed-forward layers whole


def test_which_axis_of_which_parameter():
    mesh = make_mesh(1, 2, devices=jax.devices())  # 1 x 2 x 1 x 1: sizes of 1 divide everything

    def axes(path, shape):
        return tuple(spec(path, shape, mesh, FROZEN))

    assert axes("down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel", (32, 32)) == ("fsdp", "tensor")
    assert axes("down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_out_0/kernel", (32, 32)) == ("tensor", "fsdp")
    assert axes("mid_block/resnets_0/conv1/kernel", (3, 3, 32, 64)) == (None, None, "fsdp", "tensor")
    assert axes("mid_block/resnets_0/conv1/bias", (64,)) == ("tensor",)
    assert axes("text_model/embeddings/token_embedding/embedding", (100, 32)) == (None, "fsdp")
    assert axes("conv_norm_out/scale", (32,)) == (None,)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({"tensor": 3}, r"config\.mesh: fsdp x tensor = 1 x 3; expected a divisor of the 2 devices"),
        ({"fsdp": 2, "batch_size": 3}, r"config\.mesh\.fsdp=2: splits the batch too; expected a divisor of 3"),
    ],
)
def test_devices_that_cannot_be_divided(mesh, expected):
    with pytest.raises(UserError, match=expected):
        make_mesh(**{"concepts": 1, "batch_size": 4, "devices": jax.devices()} | mesh)
