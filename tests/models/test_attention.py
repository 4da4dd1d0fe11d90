"""The UNet's attention: every kernel gives what a plain softmax does, and each shape takes the one meant for it."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from catversion_jax.models import attention
from tests.conftest import max_error


def qkv(queries: int, keys: int, heads: int = 2, size: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, n, heads, size)).astype(np.float32) for n in (queries, keys, keys)]


def reference(query, key, value):
    """In numpy, float64, one head at a time."""
    out = np.empty(query.shape)
    for b, h in np.ndindex(query.shape[0], query.shape[2]):
        logits = query[b, :, h].astype(np.float64) @ key[b, :, h].T / query.shape[3] ** 0.5
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out[b, :, h] = weights / weights.sum(1, keepdims=True) @ value[b, :, h]
    return out


@pytest.mark.parametrize(
    "kernel", [attention.heads_first, partial(attention.splash, interpret=True)], ids=["heads_first", "splash"]
)
@pytest.mark.parametrize("keys", [128, 256])
def test_kernels(kernel, keys):
    arrays = qkv(256, keys)
    assert max_error(jax.jit(kernel)(*arrays), reference(*arrays)) < 1e-5


@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_the_tpu_kernel_is_split_by_hand(axis):
    """Over pictures or heads; numbers and gradients are those of one device, and the arrays stay where they are."""
    shape = {"concept": 1, "data": 1, "fsdp": 1, "tensor": 1} | {axis: 2}
    mesh = Mesh(np.asarray(jax.devices()).reshape(tuple(shape.values())), tuple(shape))
    places = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    arrays = qkv(128, 128)

    def value_and_grads(kernel, arrays):
        return jax.value_and_grad(lambda *x: jnp.sin(kernel(*x)).sum(), argnums=(0, 1, 2))(*arrays)

    def split(arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return value_and_grads(partial(attention.splash, interpret=True), arrays)

    compiled = jax.jit(split).lower(jax.device_put(arrays, places)).compile()
    assert "all-gather" not in compiled.as_text()
    value, grads = compiled(jax.device_put(arrays, places))
    expected, expected_grads = value_and_grads(attention.heads_first, arrays)
    assert float(value) == pytest.approx(float(expected), abs=1e-3)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert max_error(ours, theirs) < 1e-5 * np.abs(theirs).max()


def test_an_odd_number_of_keys_is_padded(monkeypatch):
    """As cuDNN's kernel wants it; here with XLA's, which takes the same arguments."""
    run = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **more: run(*x, **more))
    query, key, value = (jax.random.normal(jax.random.key(n), (2, k, 4, 8)) for n, k in enumerate((16, 77, 77)))
    np.testing.assert_allclose(attention.cudnn(query, key, value), run(query, key, value), atol=1e-6)
    grads = (jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), (0, 1, 2)) for f in (attention.cudnn, run))
    for ours, theirs in zip(*(grad(query, key, value) for grad in grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "shape", "keys", "dtype", "index"),
    [
        ("gpu 9.0", (2, 4096, 8, 40), 4096, "bfloat16", 0),
        ("gpu 8.0", (2, 4096, 8, 40), 4096, "bfloat16", 0),
        ("gpu 12.0", (2, 4096, 8, 40), 4096, "bfloat16", 0),
        ("gpu 7.5", (2, 4096, 8, 40), 4096, "bfloat16", 1),  # Turing
        ("gpu gfx90a", (2, 4096, 8, 40), 4096, "bfloat16", 1),  # AMD
        ("gpu", (2, 4096, 8, 40), 4096, "bfloat16", 1),
        ("gpu 9.0", (2, 4096, 8, 40), 4096, "float32", 1),
        ("gpu 9.0", (2, 4096, 8, 40), 77, "bfloat16", 0),
        ("gpu 9.0", (2, 256, 8, 160), 256, "bfloat16", 0),
        ("gpu 8.0", (2, 256, 8, 160), 256, "bfloat16", 1),  # wide heads are Hopper's
        ("gpu 12.0", (2, 256, 8, 160), 256, "bfloat16", 1),
        ("gpu 9.0", (2, 64, 8, 160), 64, "bfloat16", 1),
        ("tpu", (2, 4096, 8, 40), 4096, "bfloat16", 0),
        ("tpu", (2, 4096, 8, 40), 77, "bfloat16", 1),
        ("tpu", (2, 2304, 8, 80), 2304, "bfloat16", 1),
        ("tpu", (2, 256, 8, 160), 256, "bfloat16", 1),
        ("cpu", (2, 4096, 8, 40), 4096, "bfloat16", 0),
    ],
)
def test_which_kernel(monkeypatch, backend, shape, keys, dtype, index):
    taken = []
    backend, _, capability = backend.partition(" ")
    device = SimpleNamespace(compute_capability=capability) if capability else SimpleNamespace()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    kernels = tuple(
        attention.Kernel(lambda query, *_, n=n: taken.append(n) or query, kernel.suits)
        for n, kernel in enumerate(attention.KERNELS[backend])
    )
    monkeypatch.setitem(attention.KERNELS, backend, kernels)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    key = jax.ShapeDtypeStruct((shape[0], keys, *shape[2:]), dtype)
    query = jax.ShapeDtypeStruct(shape, dtype)
    jax.eval_shape(lambda *x: attention.dot_product_attention(*x), query, key, key)  # traced anew each time
    assert taken == [index]


def test_on_several_chips_the_tpu_kernel_needs_a_mesh(monkeypatch):
    """Photos are encoded and images sampled without one; XLA cannot split the kernel over the chips."""
    shape = (2, 4096, 8, 40)
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, 2), ("concept", "data"))
    for count, alone in ((1, True), (4, False)):
        monkeypatch.setattr(jax, "local_device_count", lambda count=count: count)
        assert attention.fits_splash(shape, shape, jnp.dtype("bfloat16")) is alone
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            assert attention.fits_splash(shape, shape, jnp.dtype("bfloat16"))
