"""The compiler options: those of the backend, none that its XLA does not know."""

import jax
import jax.numpy as jnp
import pytest

from catversion_jax.utils import compiler


@pytest.fixture(autouse=True)
def asked_again():
    compiler.compiler_options.cache_clear()
    yield
    compiler.compiler_options.cache_clear()


def test_the_backends_options_are_used():
    assert compiler.compiler_options() == compiler.OPTIONS["cpu"]
    assert compiler.jit(lambda x: 2 * x, donate_argnums=0)(jnp.ones(3)).tolist() == [2, 2, 2]


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_cpu_no_such_option": "1"})
    assert compiler.compiler_options() == {}
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda: 0, compiler_options=compiler.OPTIONS["cpu"])()


def test_the_options_of_every_backend_are_known():
    for options in compiler.OPTIONS.values():
        jax.jit(lambda: 0, compiler_options=options)()


def test_nothing_starts_the_backend_before_the_first_call(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked for the backend"))
    compiler.jit(lambda x: x)
