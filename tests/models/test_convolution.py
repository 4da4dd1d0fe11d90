"""The 3x3 convolution against flax's: its value, its gradients, and that by the input with a kernel turned before."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.models.convolution import TURNED, Conv3x3, turned_kernels

SHAPE = (2, 6, 5, 3)


@pytest.fixture(scope="module")
def given():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"kernel": jax.random.normal(keys[0], (3, 3, 3, 4)), "bias": jax.random.normal(keys[1], (4,))}
    return params, jax.random.normal(keys[2], SHAPE), jax.random.normal(keys[3], (*SHAPE[:3], 4))


def value_and_grads(module, variables, x, weights):
    def loss(params, x):
        y = module.apply({"params": params, **variables}, x)
        return (y * weights).sum(), y

    (_, y), (params, of_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return y, of_x, params


def test_it_is_flaxs(given):
    params, x, weights = given
    for module in (Conv3x3(4, jnp.float32), nn.Conv(4, (3, 3), padding=1)):
        assert jax.tree.map(np.shape, module.init(jax.random.key(0), x)["params"]) == jax.tree.map(np.shape, params)
    ours, theirs = (
        value_and_grads(module, {"params": params}, x, weights)
        for module in (Conv3x3(4, jnp.float32), nn.Conv(4, (3, 3), padding=1, dtype=jnp.float32))
    )
    for mine, flaxs in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, flaxs, rtol=1e-5, atol=1e-5)


def test_a_turned_kernel_gives_the_same_gradient_of_the_input(given):
    params, x, weights = given
    module = Conv3x3(4, jnp.float32)
    y, of_x, _ = value_and_grads(module, {"params": params}, x, weights)
    turned = turned_kernels(params | {"other": jnp.ones((1, 1, 3, 4))})
    assert jax.tree.map(np.shape, turned) == {"kernel": (3, 3, 4, 3)}
    variables = {"params": params, TURNED: turned}
    again, of_x_again, of_params = value_and_grads(module, variables, x, weights)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_allclose(of_x_again, of_x, rtol=1e-5, atol=1e-5)
    assert not of_params["kernel"].any()


def test_half_precision(given):
    params, x, _ = given
    y = Conv3x3(4, jnp.bfloat16).apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    expected = nn.Conv(4, (3, 3), padding=1, dtype=jnp.bfloat16).apply({"params": params}, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))
