"""Layer normalization against flax's: its value, and its gradient to the input and to the parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.models.norms import LayerNorm


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 4e-2)])
def test_it_is_flaxs(dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 4)
    x = (3 + 2 * jax.random.normal(keys[0], (2, 7, 24))).astype(dtype)
    params = {name: jax.random.normal(key, (24,)) for name, key in zip(("scale", "bias"), keys[1:], strict=False)}
    weights = jax.random.normal(keys[3], x.shape)

    def value_and_grads(module):
        def loss(params, x):
            y = module.apply({"params": params}, x)
            assert y.dtype == dtype
            return (y * weights).sum(), y

        (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, grads

    ours, theirs = (value_and_grads(made) for made in (LayerNorm(1e-5, dtype), nn.LayerNorm(epsilon=1e-5, dtype=dtype)))
    for mine, flaxs in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = np.abs(np.asarray(flaxs, np.float32)).max()
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(flaxs, np.float32), atol=tolerance * scale)


def test_what_overflows_is_not_finite():
    x = jnp.array([[1.0, -1.0, 2.0, 0.5], [1e30, -1e30, 1e29, 0]])
    y = LayerNorm(1e-5, jnp.float32).apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x)
    assert jnp.isfinite(y[0]).all()
    assert jnp.isnan(y[1]).all()
