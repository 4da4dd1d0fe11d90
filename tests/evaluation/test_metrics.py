"""Every score against a second computation, written apart from it, on the embeddings that PyTorch made."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from catversion_jax.evaluation import metrics


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float((a * b).sum() / math.sqrt((a * a).sum()) / math.sqrt((b * b).sum()))


@pytest.fixture(scope="module")
def raw(golden) -> dict[str, np.ndarray]:
    """PyTorch's embeddings, not normalized: two pictures, three prompts, and more of both made of them."""
    rng = np.random.default_rng(0)
    images, texts = golden["image.image_embeds"], golden["text.text_embeds"]
    more = np.concatenate([images, rng.normal(size=(3, 2)) @ images + rng.normal(size=(3, images.shape[1]))])
    return {"images": more.astype(np.float32), "references": images, "texts": texts[[0, 2, 0, 2, 1]]}


@pytest.fixture(scope="module")
def unit(raw) -> dict[str, np.ndarray]:
    return {name: metrics.normalize(x) for name, x in raw.items()}


def test_clip_t(raw, unit):
    expected = [cosine(image, text) for image, text in zip(raw["images"], raw["texts"], strict=True)]
    np.testing.assert_allclose(metrics.clip_t(unit["images"], unit["texts"]), expected, atol=1e-6)


def test_clip_i_is_the_mean_over_all_pairs(raw, unit):
    pairs = [cosine(a, b) for a, b in itertools.product(raw["images"], raw["references"])]
    each = metrics.clip_i(unit["images"], unit["references"])
    assert each.shape == (5,)
    assert each.mean() == pytest.approx(np.mean(pairs), abs=1e-6)


def test_overall():
    assert metrics.overall(np.float64(0.3), np.float64(0.7)) == pytest.approx(math.sqrt(0.21))
    np.testing.assert_equal(
        metrics.overall(np.array([-0.1, -0.1, 0.25]), np.array([0.5, -0.5, 1])), [np.nan] * 2 + [0.5]
    )


def test_drift(raw, unit):
    moved = raw["images"][::-1]
    expected = [1 - cosine(a, b) for a, b in zip(raw["images"], moved, strict=True)]
    np.testing.assert_allclose(metrics.drift(unit["images"], unit["images"][::-1]), expected, atol=1e-6)
    np.testing.assert_array_equal(metrics.drift(unit["images"], unit["images"]), 0)


def test_relative_change_of_text_states(golden):
    base, moved = golden["text.last_hidden_state"][0], golden["text_with_prefix.p1_bias0"][0]
    expected = math.sqrt(((moved - base).astype(np.float64) ** 2).sum() / (base.astype(np.float64) ** 2).sum())
    assert metrics.relative_change(base, moved) == pytest.approx(expected, rel=1e-6)
    assert metrics.relative_change(base, base) == 0


def test_diversity(raw, unit):
    pairs = [1 - cosine(a, b) for a, b in itertools.combinations(raw["images"], 2)]
    assert metrics.diversity(unit["images"]) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert metrics.diversity(unit["images"][:1]) is None
    assert metrics.diversity(unit["images"][[0, 0, 0]]) == pytest.approx(0, abs=1e-6)


def test_nearest(raw, unit):
    expected = [max(range(3), key=lambda i: cosine(image, raw["texts"][[0, 1, 4][i]])) for image in raw["images"]]
    np.testing.assert_array_equal(metrics.nearest_caption(unit["images"], unit["texts"][[0, 1, 4]]), expected)


def test_interval_is_scipys():
    """SciPy draws other resamples: the ends agree as well as 9,999 of them tell."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.2, 0.4, 25), rng.uniform(0.4, 0.9, 25)

    def statistic(x, y, axis):
        return np.sqrt(x.mean(axis) * y.mean(axis))

    theirs = scipy.stats.bootstrap((a, b), statistic, paired=True, vectorized=True, method="percentile", rng=rng)
    expected = theirs.confidence_interval
    np.testing.assert_allclose(metrics.interval(metrics.overall, a, b), (expected.low, expected.high), atol=2e-3)
    low, high = metrics.interval(lambda mean: mean, a)
    assert low < a.mean() < high
    assert metrics.interval(lambda mean: mean, a) == (low, high)
    assert metrics.interval(lambda mean: mean, a[:1]) is None
    assert metrics.interval(metrics.overall, -a, b) is None


@pytest.mark.parametrize("rows", [2, 7, 333, 3000])
def test_blocks_of_the_interval_draw_what_all_at_once_drew(rows):
    """Against the resamples of one call, as the intervals of earlier reports were computed."""
    a, b = np.random.default_rng(2).uniform(0.2, 0.9, (2, rows))
    index = np.random.default_rng(0).integers(0, rows, (metrics.RESAMPLES, rows))
    values = metrics.overall(a[index].mean(axis=1), b[index].mean(axis=1))
    assert metrics.interval(metrics.overall, a, b) == tuple(np.quantile(values, (0.025, 0.975)))


def test_the_interval_of_thousands_of_pictures_takes_little_memory():
    values = np.random.default_rng(0).random(3000)
    tracemalloc.start()
    metrics.interval(lambda mean: mean, values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20
