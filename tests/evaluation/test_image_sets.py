"""Images to score are read one by one, as large and as many as they are; extreme shapes take no memory either."""

import weakref

import numpy as np
import pytest
from PIL import Image

from catversion_jax.data.photos import FolderRules, PhotoFile, find_photos
from catversion_jax.evaluation import page, scores
from catversion_jax.evaluation.encoders import MAX_ASPECT, Clip, ImageEncoder, Preprocessing
from catversion_jax.evaluation.image_sets import MaskedImages, StoredImages, masked_images
from catversion_jax.evaluation.masks import FILL
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.padded_batches import BATCH, groups, in_batches, streamed


class StandIn(ImageEncoder):
    """An encoder whose embedding is the image itself, reduced."""

    def of_pixels(self, pixels):
        flat = np.stack(list(pixels)).reshape(len(pixels), -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def stand_in(size: int = 4) -> StandIn:
    return StandIn("a stand-in", None, {}, Preprocessing(size, size, (-1, -1, -1), (1, 1, 1)))


@pytest.fixture
def stored(tmp_path) -> StoredImages:
    """Nineteen images with masks, of which one covers all."""
    rng = np.random.default_rng(0)
    (tmp_path / "masks").mkdir()
    for i in range(19):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(tmp_path / f"{i:02}.png")
        mask = Image.new("L", (16, 12), 255 if i == 5 else 0)
        mask.paste(255, (4, 3, 12, 9))
        mask.save(tmp_path / "masks" / f"{i:02}.png")
    return StoredImages(find_photos(tmp_path, "", FolderRules(most=100)))


def test_stored_images_are_embedded_like_those_in_memory(stored, caplog):
    encoders = scores.Encoders(Clip(stand_in(), None), stand_in(3))
    found = scores.embed(stored, encoders)
    assert "1 of 19 masks cover all of their images" in caplog.text
    photos = [file.read() for file in stored.files]
    again = scores.embed(masked_images(photos), encoders)
    clip = encoders.clip.image
    filled = [np.where(photo.mask[..., None], photo.image, np.uint8(FILL)) for photo in photos]
    expected = clip.of_pixels([clip.preprocessing(image) for image in filled])
    for name in ("clip", "masked", "dino"):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))
    np.testing.assert_array_equal(found.masked, expected)
    assert found.clip.shape == (19, 48)
    assert found.dino.shape == (19, 27)


def test_one_image_is_in_memory_at_a_time(stored, monkeypatch):
    """Also while thumbnails are made."""
    alive: list[weakref.ref] = []
    read = PhotoFile.read

    def counted(self, resolution=None):
        assert sum(ref() is not None for ref in alive) <= 1  # the one before, until this one takes its place
        photo = read(self, resolution)
        alive.append(weakref.ref(photo))
        return photo

    monkeypatch.setattr(PhotoFile, "read", counted)
    scores.embed(stored, scores.Encoders(Clip(stand_in(), None), None))
    assert len(alive) == 19
    page.thumbnail_rows(stored, ["a"] * 19, stored)
    assert len(alive) == 19 + 2 * page.COLUMNS


def test_an_empty_mask_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"a: masks/a\.png shows no subject; expected it bright on black, or cut out"):
        list(StoredImages(find_photos(tmp_path)))


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 4_000), (40, 40 * MAX_ASPECT)])
def test_extreme_shapes_take_no_memory(shape, monkeypatch):
    """The middle of a grey ramp is what it always was; the image is not resized as a whole."""
    resize, areas = Image.Image.resize, []

    def measured(self, size, *args):
        areas.append(size[0] * size[1])
        return resize(self, size, *args)

    monkeypatch.setattr(Image.Image, "resize", measured)
    length = max(shape)
    ramp = np.linspace(0, 255, length).astype(np.uint8)
    image = np.broadcast_to((ramp[:, None] if shape[0] == length else ramp)[..., None], (*shape, 3)).copy()
    pixels = Preprocessing(224, 224, (0, 0, 0), (1, 1, 1))(image)
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_allclose(pixels.mean(), 0.5, atol=0.02)
    assert max(areas) <= 224 * 224 * MAX_ASPECT


def test_groups_and_streams():
    assert [len(group) for group in groups(range(2 * BATCH + 1))] == [BATCH, BATCH, 1]
    rows = np.random.default_rng(0).normal(size=(2 * BATCH + 1, 5))

    def whole(batch):
        assert batch.shape == (BATCH, 5)
        return np.cumsum(batch, axis=0)  # depends on the batch, so the same batches are made

    np.testing.assert_array_equal(streamed(whole, iter(rows)), in_batches(whole, rows))


def test_the_grid_of_many_prompts_is_cut():
    images = MaskedImages(list(np.zeros((100, 8, 8, 3), np.uint8)), None)
    rows = page.thumbnail_rows(images, [f"prompt {i}" for i in range(100)], images)
    assert list(rows) == ["references", *(f"prompt {i}" for i in range(page.MAX_ROWS))]
