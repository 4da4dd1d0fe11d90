"""The exact GELU against Python's error function, also in bfloat16's tail."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.models.activations import gelu


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_it_is_exact(dtype, tolerance):
    x = np.asarray(jnp.linspace(-4, 4, 801, dtype=dtype), np.float64)
    expected = np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    found = gelu(jnp.asarray(x, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=1e-6)
