"""Fixtures of the tests of weights."""

import numpy as np
import pytest

from tests import ldm_files


@pytest.fixture(scope="module")
def sd1() -> dict[str, dict[str, np.ndarray]]:
    """Stable Diffusion 1.x, narrowed, as diffusers names its tensors."""
    return ldm_files.to_diffusers(ldm_files.random_params("sd1"))
