"""Warnings about photos: each fault is named, and the shipped photos have none."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from catversion_jax.data import concept_sets
from catversion_jax.data.photo_checks import check_photos
from catversion_jax.data.photos import DataConfig, Photo, training_photos
from tests.conftest import DREAMBOOTH, needs_dreambooth

CONCEPTS = concept_sets.find_concepts(concept_sets.SHIPPED)


def photos_of(folder: concept_sets.ConceptFolder) -> list[Photo]:
    return training_photos(DataConfig(dir=str(folder.train), masks_dir=str(folder.train_masks)), 64)


@pytest.mark.parametrize("folder", CONCEPTS, ids=lambda folder: folder.name)
def test_good_photos(folder):
    assert check_photos(photos_of(folder)) == [[]] * 5


@needs_dreambooth
def test_good_photographs():
    folders = sorted(path for path in DREAMBOOTH.iterdir() if path.is_dir())[:6]
    for folder in folders:
        assert not any(check_photos(training_photos(DataConfig(dir=str(folder)), 512))), folder


def test_faults():
    first, second, *_ = photos_of(CONCEPTS[0])
    blur = np.asarray(Image.fromarray(second.image).filter(ImageFilter.GaussianBlur(3)))
    cut = np.roll(second.mask, -int(np.flatnonzero(second.mask.any(1))[0]) - 8, axis=0)
    faulty = [
        first,
        Photo("again", np.clip(first.image.astype(int) + 2, 0, 255).astype(np.uint8), None),
        Photo("mirrored", first.image[:, ::-1], None),
        Photo("blurred", blur, None),
        Photo("small", second.image, None, size=(40, 90)),
        Photo("cut", np.rot90(second.image), cut),
    ]
    warnings = check_photos(faulty)
    assert warnings[0] == []
    assert warnings[1:3] == [[f"nearly the same as {first.name}"]] * 2
    assert warnings[3][0].startswith("blurred: sharpness 0.0")
    assert "too small: 40x90, enlarged to 64" in warnings[4]
    assert any(warning.startswith("subject cut off: ") and "top" in warning for warning in warnings[5])
