"""How programs are compiled: `jit`, which is jax.jit with the compiler options that suit the backend."""

from collections.abc import Callable
from functools import cache, cached_property, update_wrapper
from typing import Any

import jax

OPTIONS = {
    # Its own kernels: a training step takes a tenth longer with YNNPACK's.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # Products of this size with one operand, such as to_q, to_k and to_v, are made one, and then cut apart again.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": "4"},
}
"""backend -> XLA's options; docs/performance.md has what they change."""


@cache
def compiler_options() -> dict[str, str]:
    """Returns the options for this process's backend; none if its XLA does not know them."""
    options = OPTIONS.get(jax.default_backend(), {})
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


class jit:
    """jax.jit(function, ...) with `compiler_options`; it cannot be called in another such function."""

    def __init__(self, function: Callable, **arguments: Any) -> None:
        update_wrapper(self, function)
        self.function, self.arguments = function, arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted(*args, **kwargs)

    # At the first call, since a module that is imported must not start the backend.
    @cached_property
    def jitted(self) -> Any:
        return jax.jit(self.function, compiler_options=compiler_options(), **self.arguments)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Returns the program for arguments, which may be shapes, as the method of jax.jit's functions does."""
        return self.jitted.lower(*args, **kwargs)
