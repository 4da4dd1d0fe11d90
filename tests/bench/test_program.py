"""A compiled program, read: the kernels of its loop, and their bytes, counted by hand."""

import pytest

from catversion_jax.bench.absent import CHIPS, GPU
from catversion_jax.bench.program import read_program
from tests.commands import error_of

TEXT = """HloModule jit_chunk

%fused (param_0: f32[4,8]) -> f32[4] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  ROOT %reduce.1 = f32[4]{0} reduce(%param_0, %constant), dimensions={1}, to_apply=%add
}

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %conv = (bf16[4,8]{1,0}, u8[16]{0}) custom-call(%x, %x), custom_call_target="__cudnn$convForward"
  %wide = f32[4,8]{1,0} convert(%x)
  %sum = f32[4]{0} fusion(%wide), kind=kInput, calls=%fused
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %while = (s32[], bf16[4,8]{1,0}) while(%p), condition=%test, body=%body
  ROOT %r = bf16[4,8]{1,0} get-tuple-element(%while), index=1
}
"""


def test_the_kernels_of_the_loop_are_counted():
    program = read_program(TEXT)
    x, wide = 4 * 8 * 2, 4 * 8 * 4
    sizes = {"__cudnn$convForward": 3 * x + 16, "convert": x + wide, "reduce": wide + 4 * 4}
    assert {kernel.kind: kernel.bytes for kernel in program.kernels} == sizes
    assert program.bytes == sum(sizes.values())
    assert list(program.by_kind().items()) == sorted(
        ((kind, (1, size)) for kind, size in sizes.items()), key=lambda entry: -entry[1][1]
    )


TPU_TEXT = """HloModule jit_chunk

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start.1 = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((bf16[4,8]{1,0:T(8,128)(2,1)}), bf16[1,8]{1,0:T(2,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:1], [0:8]}
  %slice-done.1 = bf16[1,8]{1,0:T(2,128)(2,1)S(1)} slice-done(%slice-start.1)
  %kernel.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} custom-call(%copy-done.1, %p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="a"}
  ROOT %r = bf16[4,8]{1,0:T(8,128)(2,1)} copy(%kernel.1)
}
"""  # noqa: E501


def test_what_stays_in_a_tpus_fast_memory_is_not_counted():
    kinds = {"copy-start": (1, 64), "slice-start": (1, 16), "tpu_custom_call": (1, 64), "copy": (1, 64)}
    assert read_program(TPU_TEXT).by_kind() == kinds


def test_an_h100_is_what_xla_has_of_one():
    target = CHIPS["h100"].target()
    for field in ("core_count: 132 ", "shared_memory_per_block_optin: 232448 ", "l2_cache_size: 52428800 ",
                  "threads_per_core_limit: 2048 ", "cuda_compute_capability { major: 9 minor: 0 }"):  # fmt: skip
        assert field in target
    assert all(chip.flops > 1e14 and chip.capability >= (8, 0) for chip in CHIPS.values() if isinstance(chip, GPU))


@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_without_the_chips_compiler_one_line_says_what_to_install(chip):
    error = error_of("bench", "--config=mini", f"--for={chip}", "--sizes=1x1")
    assert error.startswith("catversion: error: --for: ")
    assert "pip install 'catversion-jax[" in error
