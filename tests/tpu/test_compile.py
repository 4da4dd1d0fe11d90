"""TPU v5e programs of the step, with libtpu's compiler: they can be built, and hold the kernel and the collectives that
they should."""

import jax
import pytest

from catversion_jax.bench.absent import CHIPS, set_environment
from catversion_jax.models import attention
from tests.narrow import program
from tests.training.eight_devices import COLLECTIVE

set_environment()  # before the first compilation


@pytest.fixture(scope="module")
def chips() -> list[jax.Device]:
    return CHIPS["v5e"].devices()


def test_concepts_share_nothing(chips):
    compiled = program("tpu", chips, concepts=4, length=2)
    assert "tpu_custom_call" in compiled  # the splash kernel
    assert COLLECTIVE.findall(compiled) == []


def test_a_split_base_model(chips):
    compiled = program("tpu", chips, concepts=2, length=1, fsdp=2)
    assert "tpu_custom_call" in compiled
    assert "all-gather" in COLLECTIVE.findall(compiled)


def test_without_the_kernel_there_is_none(chips, monkeypatch):
    """So that the tests above see what they say."""
    monkeypatch.setitem(attention.KERNELS, "tpu", (attention.XLA,))
    assert "tpu_custom_call" not in program("tpu", chips, concepts=1, length=1)
