"""The method itself against a direct numpy transcription of the paper's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.models import prefix_attention

B, Q, P, H, D = 2, 6, 3, 2, 8


def numpy_attention(q, k, v, mask, dk, dv, bias, visible):
    """softmax(Q [dK ; K]^T / sqrt(D) + mask) [dV ; V], head by head."""
    q, k, v, mask, dk, dv = map(np.asarray, (q, k, v, mask, dk, dv))
    out = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            logits = q[b, :, h] @ np.concatenate([dk[:, h], k[b, :, h]]).T / np.sqrt(D)
            logits[:, :P] += bias
            allowed = np.concatenate([np.repeat(visible[b][:, None], P, 1), mask], axis=1)
            weights = np.where(allowed, np.exp(logits), 0)
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, h] = weights @ np.concatenate([dv[:, h], v[b, :, h]])
    return out


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, Q, H, D)).astype(np.float32) for _ in range(3))
    dk, dv = (rng.normal(size=(P, H, D)).astype(np.float32) for _ in range(2))
    return tuple(map(jnp.asarray, (q, k, v, np.tril(np.ones((Q, Q), bool)), dk, dv)))


def layer_prefix(dk, dv, bias, visible, strength=1.0):
    arrays = (jnp.asarray(dk), jnp.asarray(dv))
    return prefix_attention.LayerPrefix(*arrays, bias, jnp.float32(strength), jnp.asarray(visible)[..., None])


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_concatenation_is_the_papers_formula(arrays, bias):
    q, k, v, mask, dk, dv = arrays
    visible = np.ones((B, Q), bool)
    actual = prefix_attention.attend(q, k, v, mask, layer_prefix(dk, dv, bias, visible))
    np.testing.assert_allclose(actual, numpy_attention(q, k, v, mask, dk, dv, bias, visible), atol=1e-5)


def test_prefix_is_seen_only_where_visible(arrays):
    q, k, v, mask, dk, dv = arrays
    visible = np.arange(Q) >= np.array([[2], [Q]])  # the second prompt never sees it
    actual = prefix_attention.attend(q, k, v, mask, layer_prefix(dk, dv, 0.0, visible))
    np.testing.assert_allclose(actual, numpy_attention(q, k, v, mask, dk, dv, 0.0, visible), atol=1e-5)
    without = prefix_attention.attend(q, k, v, mask)
    np.testing.assert_allclose(actual[0, :2], without[0, :2], atol=1e-6)
    np.testing.assert_allclose(actual[1], without[1], atol=1e-6)
    assert np.abs(actual[0, 2:] - without[0, 2:]).max() > 0.1


def test_it_is_a_residual_on_the_base_attention(arrays):
    """(1 - m) Attn(Q, K, V) + m Attn(Q, dK, dV) with m the prefix's share of the attention."""
    q, k, v, mask, dk, dv = arrays
    everywhere = np.ones((B, Q), bool)
    base = np.asarray(prefix_attention.attend(q, k, v, mask))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(D)
    own = np.where(mask, np.exp(scores), 0).sum(-1)
    prefix_scores = np.exp(np.einsum("bqhd,phd->bhqp", q, dk) / np.sqrt(D))
    share = (prefix_scores.sum(-1) / (prefix_scores.sum(-1) + own)).swapaxes(1, 2)[..., None]
    delta = np.einsum("bhqp,phd->bqhd", prefix_scores / prefix_scores.sum(-1, keepdims=True), dv)
    actual = prefix_attention.attend(q, k, v, mask, layer_prefix(dk, dv, 0.0, everywhere))
    np.testing.assert_allclose(actual, (1 - share) * base + share * delta, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 2.0])
def test_strength_scales_the_residual(arrays, strength):
    """It is linear between the base model's attention and the prefix's, and beyond."""
    q, k, v, mask, dk, dv = arrays
    visible = np.arange(Q) >= np.array([[1], [3]])
    base = np.asarray(prefix_attention.attend(q, k, v, mask))
    full = numpy_attention(q, k, v, mask, dk, dv, 0.5, visible)
    actual = prefix_attention.attend(q, k, v, mask, layer_prefix(dk, dv, 0.5, visible, strength))
    np.testing.assert_allclose(actual, base + strength * (full - base), atol=1e-5)


def test_at_strength_1_the_weights_are_those_of_one_softmax(arrays):
    """Bit for bit, so that concepts and trainings from before the strength was linear stay as they are."""
    q, k, v, mask, dk, dv = arrays
    scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q * D**-0.5, k), -jnp.inf)
    prefix_scores = jnp.einsum("bqhd,phd->bhqp", q * D**-0.5, dk)
    weights = jax.nn.softmax(jnp.concatenate([prefix_scores, scores], axis=-1))
    of_prefix = jnp.einsum("bhqp,phd->bqhd", weights[..., :P], dv)
    expected = of_prefix + jnp.einsum("bhqk,bkhd->bqhd", weights[..., P:], v)
    actual = prefix_attention.attend(q, k, v, mask, layer_prefix(dk, dv, 0.0, np.ones((B, Q), bool)))
    np.testing.assert_array_equal(actual, expected)


def test_prefix_of_a_layer():
    embeddings = jnp.arange(P * 2 * 2 * H * D, dtype=jnp.float32).reshape(P, 2, 2, H, D)
    prefix = prefix_attention.Prefix(embeddings, 0.0, jnp.float32(1), jnp.ones((1, Q, 1), bool), layers=(4, 7))
    assert prefix.at(5) is None
    np.testing.assert_array_equal(prefix.at(7).key, embeddings[:, 1, 0])
    np.testing.assert_array_equal(prefix.at(4).value, embeddings[:, 0, 1])


@pytest.mark.parametrize(
    ("layers", "resolved"),
    [((-3, -2, -1), (9, 10, 11)), ((0,), (0,)), ((11, 9), (9, 11)), (range(12), tuple(range(12)))],
)
def test_resolve_layers(layers, resolved):
    assert prefix_attention.resolve_layers(tuple(layers), 12) == resolved


@pytest.mark.parametrize("layers", [(), (12,), (-13,), (3, 3), (-1, 11)])
def test_wrong_layers(layers):
    with pytest.raises(ValueError, match="expected distinct indices into 12"):
        prefix_attention.resolve_layers(layers, 12)


def test_init():
    prefix = prefix_attention.init_prefix(jax.random.key(0), length=64, layers=3, heads=(12, 64), std=0.5)
    assert prefix.shape == (64, 3, 2, 12, 64)
    assert prefix.dtype == jnp.float32
    assert float(prefix.std()) == pytest.approx(0.5, rel=0.02)
