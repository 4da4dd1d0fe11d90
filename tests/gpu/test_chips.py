"""The step's programs for other GPUs, for several concepts, and without flash attention."""

import re

import pytest

from catversion_jax.bench.program import read_program
from catversion_jax.models import attention
from tests.gpu.programs import FLASH, kernels_of, text_of


def test_without_flash_attention_there_is_none(monkeypatch):
    """So that the tests of an H100 see what they say."""
    monkeypatch.setitem(attention.KERNELS, "gpu", (attention.XLA,))
    text = text_of("h100", length=1)
    assert not kernels_of(text, FLASH[0])
    assert re.findall(r"\[[\d,]*1024,77\]", "".join(k.text for k in read_program(text).kernels))


@pytest.mark.parametrize("chip", ["a100", "l4"])
def test_ampere_and_ada_take_flash_attention(chip):
    assert kernels_of(text_of(chip, length=1), FLASH[0])


def test_several_concepts():
    one, many = (read_program(text_of("h100", concepts)) for concepts in (1, 4))
    assert len(many.kernels) < 1.5 * len(one.kernels)
