"""The exact GELU against Python's error function, also in bfloat16's tail."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.models.activations import gelu


@pytest.mark.parametrize(
    ("backend", "dtype", "relative", "absolute"),
    [
        ("cpu", jnp.float32, 1e-6, 1e-6),
        ("cpu", jnp.bfloat16, 2**-8, 1e-6),
        ("tpu", jnp.float32, 1e-6, 1e-6),
        ("tpu", jnp.bfloat16, 2**-6, 2**-12),  # its argument and its factors are rounded
    ],
)
def test_it_is_exact(backend, dtype, relative, absolute, monkeypatch):
    x = np.asarray(jnp.linspace(-4, 4, 801, dtype=dtype), np.float64)
    expected = np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    given = jnp.asarray(x, dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    found = gelu(given)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=relative, atol=absolute)
