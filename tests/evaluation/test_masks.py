"""Masks from attention, and what a mask does to a picture."""

import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.data.concept_sets import SHIPPED, ConceptFolder
from catversion_jax.data.photos import read_photos
from catversion_jax.evaluation import masks
from catversion_jax.evaluation.grabcut import grabcut
from catversion_jax.models.attention import probabilities
from catversion_jax.utils.errors import UserError


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
    np.testing.assert_allclose(
        probabilities(jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)), expected, atol=1e-6
    )


MEASURED = {
    "backpack": (0.80, 0.93),
    "dog": (0.50, 0.69),
    "owl": (0.80, 0.85),
    "robot": (0.82, 0.80),
    "rocket": (0.59, 0.87),
    "teapot": (0.80, 0.95),
}
"""The table of docs/evaluation.md: from attention, and with GrabCut."""


def heldout(name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    photos = read_photos(SHIPPED / name / "heldout", 64, SHIPPED / name / "heldout_masks")
    return np.stack([photo.image for photo in photos]), [photo.mask for photo in photos]


@pytest.mark.parametrize("name", MEASURED)
def test_how_good_attention_masks_are(mini, name):
    folder = ConceptFolder(SHIPPED / name)
    images, true = heldout(name)
    (prompt,) = folder.prompts(["a photo of {concept}"])
    found = masks.attention_masks(mini, images, [prompt] * len(images), folder.class_word)
    assert found.shape == (8, 64, 64)
    cut = map(grabcut, images, found)
    overlaps = [(masks.iou(a, c), masks.iou(b, c)) for a, b, c in zip(found, cut, true, strict=True)]
    assert np.mean(overlaps, axis=0) == pytest.approx(MEASURED[name], abs=0.01)


def test_grabcut_finds_the_edges():
    """A disc of one texture on another, of which a square is known; nothing to go by changes nothing."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    disc = (y - 22) ** 2 + (x - 26) ** 2 < 15**2
    image = (np.where(disc[..., None], (180, 60, 60), (60, 90, 160)) + rng.normal(0, 12, (48, 48, 3))).astype(np.uint8)
    square = np.zeros((48, 48), bool)
    square[12:32, 12:40] = True
    assert masks.iou(square, disc) < 0.75
    assert masks.iou(grabcut(image, square), disc) > 0.98
    np.testing.assert_array_equal(grabcut(image, square), grabcut(image, square))
    for mask in (np.zeros_like(disc), np.ones_like(disc)):
        np.testing.assert_array_equal(grabcut(image, mask), mask)
    np.testing.assert_array_equal(grabcut(np.full_like(image, 7), square), square)


def test_a_mask_does_not_depend_on_its_neighbours(mini):
    images, _ = heldout("teapot")
    together = masks.attention_masks(mini, images, ["a photo of a teapot"] * len(images), "teapot")
    (alone,) = masks.attention_masks(mini, images[3:4], ["a photo of a teapot"], "teapot")
    assert (alone == together[3]).mean() > 0.99  # but for rounding


def test_the_class_word_must_be_there(mini):
    images, _ = heldout("teapot")
    with pytest.raises(UserError, match="'a photo of a car': no class word 'teapot'"):
        masks.attention_masks(mini, images[:2], ["a teapot", "a photo of a car"], "teapot")
