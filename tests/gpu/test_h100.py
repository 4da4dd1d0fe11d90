"""An H100's program of the step, with XLA's CUDA compiler: it can be built, and holds the kernels that it should."""

import re

import pytest

from catversion_jax.bench.program import read_program
from tests.gpu.programs import FLASH, kernels_of, text_of


@pytest.fixture(scope="module")
def h100() -> str:
    return text_of("h100")


def test_convolutions_are_cudnns_with_the_channels_last(h100):
    found = [kernel for kernel in read_program(h100).kernels if kernel.kind.startswith("__cudnn$conv")]
    assert len(found) > 10
    assert all(kernel.text.startswith("(bf16[") for kernel in found)
    labels = {label for kernel in found for label in re.findall(r"dim_labels=(\w+)_\w+->(\w+)", kernel.text)}
    assert labels == {("b01f", "b01f")}


def test_attention_keeps_no_scores(h100):
    """Neither over the 1024 positions nor over the 77 tokens of a prompt."""
    forward, backward = (len(kernels_of(h100, kind)) for kind in FLASH)
    # The gradient needs not reach the first self-attention, which comes before the first prompt.
    assert (forward, backward) == (8, 7)
    assert not re.findall(r"\[[\d,]*1024,(?:1024|77|78)\]", "".join(k.text for k in read_program(h100).kernels))


def test_products_are_of_half_precision(h100):
    """Their sums are float32, as the tensor cores have them; what is multiplied is bfloat16."""
    types = dict(re.findall(r"%([\w.\-]+) = \(?(\w+\[[\d,]*\])", h100))
    operands = [types[name] for pair in re.findall(r" dot\(%([\w.\-]+), %([\w.\-]+)\)", h100) for name in pair]
    assert len(operands) > 40
    # But for the gradient of attention over so few positions that XLA computes it: [images x heads, up to 77, ...].
    wide = [shape for shape in operands if not shape.startswith("bf16")]
    assert all(re.fullmatch(r"f32\[\d+,\d{1,2},\d{1,3}\]", shape) for shape in wide), wide


def test_the_loop_moves_no_weights_to_the_host_nor_around(h100):
    body = read_program(h100)
    assert not [k for k in body.kernels if "MoveToHost" in k.text or k.kind in ("send", "recv", "infeed", "outfeed")]
    # A kernel of a convolution that is laid out anew, [3,3,i,o] -> [o,3,3,i], would be one that gives such an array.
    assert not [k for k in body.kernels if k.kind == "transpose" and re.match(r"bf16\[\d+,3,3,\d+\]", k.text)]


def test_no_gradient_of_weights(h100):
    assert "convBackwardFilter" not in h100
