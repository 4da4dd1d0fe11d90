"""The step's programs for GPUs that are not there, and their kernels."""

from catversion_jax.bench.absent import CHIPS, set_environment
from catversion_jax.bench.program import read_program
from tests.narrow import program

set_environment()  # before the first compilation

FLASH = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


def text_of(chip: str, concepts: int = 1, length: int = 3) -> str:
    return program(CHIPS[chip].backend, CHIPS[chip].devices()[:1], concepts, length)


def kernels_of(text: str, kind: str) -> list[str]:
    return [kernel.text for kernel in read_program(text).kernels if kernel.kind == kind]
