"""Masks from attention, and what a mask does to a picture."""

import numpy as np
import pytest

from catversion_jax import masks
from catversion_jax.data.photos import read_photos
from catversion_jax.errors import UserError
from catversion_jax.models.attention import probabilities
from catversion_jax.sweep import CONCEPTS


def test_background_is_filled():
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    mask = np.zeros((5, 4), bool)
    mask[1:3, 2:] = True
    filled = masks.fill_background(image, mask)
    for y in range(5):
        for x in range(4):
            np.testing.assert_array_equal(filled[y, x], image[y, x] if mask[y, x] else masks.FILL)


def test_iou():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert masks.iou(a, b) == 1
    a[:2], b[1:3] = True, True
    assert masks.iou(a, b) == pytest.approx(4 / 12)
    assert masks.iou(a, ~a) == 0


def test_otsu_is_the_best_of_all_thresholds():
    """Against all thresholds tried one by one: the least variance within the two groups."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 300), rng.normal(5, 0.7, 100)]).reshape(20, 20)
    tried = np.linspace(values.min(), values.max(), masks.BINS + 1)[1:-1]

    def within(threshold):
        low, high = values[values <= threshold], values[values > threshold]
        return low.var() * low.size + high.var() * high.size

    assert within(masks.otsu(values)) == pytest.approx(min(map(within, tried)), rel=0.01)
    assert 1.5 < masks.otsu(values) < 3.5
    assert np.isfinite(masks.otsu(np.ones((4, 4))))


def test_probabilities_are_softmax():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 7, 3, 4))
    expected = np.zeros((2, 5, 7))
    for head in range(3):
        weights = np.exp(query[:, :, head] @ key[:, :, head].swapaxes(1, 2) / 2)
        expected += weights / weights.sum(-1, keepdims=True) / 3
    np.testing.assert_allclose(probabilities(query.astype(np.float32), key.astype(np.float32)), expected, atol=1e-6)


@pytest.fixture(scope="module")
def teapots():
    return read_photos(CONCEPTS / "teapot" / "heldout", 64, CONCEPTS / "teapot" / "heldout_masks")


def test_attention_finds_the_teapot(mini, teapots):
    """docs/evaluation.md has the measured overlap of all concepts; of the teapots it is 0.80."""
    images = np.stack([photo.image for photo in teapots])
    found = masks.attention_masks(mini, images, ["a photo of a teapot"] * len(images), "teapot")
    assert found.shape == (8, 64, 64)
    overlaps = [masks.iou(mask, photo.mask) for mask, photo in zip(found, teapots, strict=True)]
    assert np.mean(overlaps) > 0.75
    alone = masks.attention_masks(mini, images[3:4], ["a photo of a teapot"], "teapot")
    assert (alone[0] == found[3]).mean() > 0.99  # not its neighbours' business, but for rounding


def test_the_class_word_must_be_there(mini, teapots):
    images = np.stack([photo.image for photo in teapots[:2]])
    with pytest.raises(UserError, match="'a photo of a car': no class word 'teapot'"):
        masks.attention_masks(mini, images, ["a teapot", "a photo of a car"], "teapot")
