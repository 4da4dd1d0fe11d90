"""The golden arrays of the schedulers are what the installed diffusers gives."""

import numpy as np

from tests import golden_schedulers


def test_golden_arrays():
    stored, now = np.load(golden_schedulers.PATH), golden_schedulers.arrays()
    np.testing.assert_array_equal(stored["cases"], now["cases"])
    for name in ("first_noise", "noise", "timesteps", "latents"):
        np.testing.assert_allclose(now[name], stored[name], rtol=1e-5, atol=1e-5)
