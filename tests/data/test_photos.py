"""Photos as people have them, and what is refused, each in one line that names the file."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from catversion_jax.data import dataset
from catversion_jax.data.latents import bucket, posteriors
from catversion_jax.data.photos import MAX_PHOTOS, read_photos
from catversion_jax.utils.errors import UserError
from tests.conftest import DREAMBOOTH, max_error, needs_dreambooth

RED, BLUE = (200, 20, 20), (20, 20, 200)


def two_halves(width=80, height=60) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def one(folder, **kwargs) -> np.ndarray:
    (photo,) = read_photos(folder, 32, **kwargs)
    assert photo.image.shape == (32, 32, 3)
    assert photo.image.dtype == np.uint8
    return photo.image


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("size", [(80, 60), (60, 200), (32, 32), (20, 20)])
def test_formats_and_aspects(tmp_path, ending, size):
    two_halves(*size).save(tmp_path / f"a.{ending}")
    image = one(tmp_path)
    np.testing.assert_allclose(image[16, 4], RED, atol=12)
    np.testing.assert_allclose(image[16, 27], BLUE, atol=12)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    two_halves().save(tmp_path / "a.jpg", exif=exif)
    image = one(tmp_path)
    np.testing.assert_allclose(image[4, 16], RED, atol=12)
    np.testing.assert_allclose(image[27, 16], BLUE, atol=12)


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (40, 40), (*RED, 0))
    image.paste((*BLUE, 255), (20, 0, 40, 40))
    image.save(tmp_path / "a.png")
    np.testing.assert_allclose(one(tmp_path)[16, 4], 255)
    np.testing.assert_allclose(one(tmp_path)[16, 27], BLUE)


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "CMYK"])
def test_modes(tmp_path, mode):
    two_halves().convert(mode).save(tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}")
    expected = np.asarray(two_halves().convert(mode).convert("RGB"))[:, 45:70]  # dithered, so its mean counts
    np.testing.assert_allclose(one(tmp_path)[:, 18:32].mean((0, 1)), expected.mean((0, 1)), atol=12)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (40, 40), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (20, 0, 40, 40))
    image.save(tmp_path / "a.png", transparency=0)
    np.testing.assert_allclose(one(tmp_path)[16, 4], 255)
    np.testing.assert_allclose(one(tmp_path)[16, 27], BLUE)


def test_sixteen_bit_grey(tmp_path):
    Image.fromarray(np.full((40, 40), 0x8080, np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_allclose(one(tmp_path), 0x80)


def test_masks(tmp_path):
    two_halves().save(tmp_path / "a.png")
    assert read_photos(tmp_path, 32)[0].mask is None
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match=r"a\.png: no mask named a\.\*"):
        read_photos(tmp_path, 32)
    mask = Image.new("L", (80, 60))
    mask.paste(255, (40, 0, 80, 60))
    mask.save(tmp_path / "masks" / "a.webp")
    found = read_photos(tmp_path, 32)[0].mask
    assert found[:, 16:].all()
    assert not found[:, :16].any()
    Image.new("L", (81, 60)).save(tmp_path / "masks" / "a.webp")
    with pytest.raises(UserError, match=r"a\.webp: \(81, 60\) pixels; expected \(80, 60\)"):
        read_photos(tmp_path, 32)
    with pytest.raises(UserError, match="nowhere: no such folder; data"):
        read_photos(tmp_path, 32, "nowhere")


def png() -> bytes:
    buffer = io.BytesIO()
    two_halves().save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (png()[:100], "damaged or truncated image"),
        (png()[:60] + bytes(40) + png()[100:], "damaged or truncated image"),
        (b"hello, I am no picture", "not a JPEG, PNG, WEBP, HEIC or AVIF image"),
        (b"GIF89a" + bytes(40), "not a JPEG, PNG, WEBP, HEIC or AVIF image"),
    ],
    ids=["empty", "truncated", "corrupt", "text", "gif"],
)
def test_what_is_no_photo(tmp_path, content, message):
    two_halves().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_photos(tmp_path, 32)
    assert str(tmp_path / "b.png") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_picture_bomb_is_not_decoded(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png"):
        read_photos(tmp_path, 32)


def test_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_photos(tmp_path / "nowhere", 32)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="0 photos; expected 1 to 100"):
        read_photos(tmp_path, 32)
    for i in range(MAX_PHOTOS + 1):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="101 photos; expected 1 to 100"):
        read_photos(tmp_path, 32)


def test_two_photos_of_one_name(tmp_path):
    two_halves().save(tmp_path / "a.png")
    two_halves().save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="another photo has the same name"):
        read_photos(tmp_path, 32)


def test_dataset_round_trip(tmp_path):
    for i, name in enumerate(("c", "a", "b")):
        two_halves(60 + i, 60).save(tmp_path / f"{name}.png")
    photos = read_photos(tmp_path, 32)
    folder = tmp_path / "data"
    dataset.write_dataset(folder, photos)
    dataset.write_dataset(folder, photos[:1])  # a complete dataset stays
    assert list(folder.rglob("*.array_record*"))
    again = dataset.read_dataset(folder)
    assert [photo.name for photo in again] == ["a", "b", "c"]
    for before, after in zip(photos, again, strict=True):
        np.testing.assert_array_equal(before.image, after.image)
        assert after.mask is None
    with pytest.raises(UserError, match="not a readable photo dataset"):
        dataset.read_dataset(tmp_path / "nothing")


def test_posteriors(tiny_pipeline):
    """Mean and std of every photo and its mirror image, as the VAE gives them one by one."""
    vae, params = tiny_pipeline.networks.vae, tiny_pipeline.params["vae"]
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    encode = jax.jit(lambda view: vae.apply({"params": params}, view, method="encode"))
    mean, std = posteriors(vae, params, images, flip=True)
    assert mean.shape == std.shape == (3, 2, 8, 8, 4)
    for i in range(3):
        for f, view in enumerate((images[i], images[i, :, ::-1])):
            m, logvar = encode(view[None] / np.float32(127.5) - 1)
            assert max_error(mean[i, f], m[0] * vae.config.scaling_factor) < 1e-4
            assert max_error(std[i, f], np.exp(logvar[0] / 2) * vae.config.scaling_factor) < 1e-4
    assert posteriors(vae, params, images, flip=False)[0].shape == (3, 1, 8, 8, 4)


def test_buckets():
    assert [bucket(n) for n in (1, 5, 8, 9, 16, 17, 100)] == [8, 8, 8, 16, 16, 32, 128]


@needs_dreambooth
def test_dreambench_subjects():
    """30 subjects of 4 to 6 real photos each, as their authors publish them."""
    folders = sorted(path for path in DREAMBOOTH.iterdir() if path.is_dir())
    photos = [read_photos(folder, 512) for folder in folders]
    assert len(folders) == 30
    assert sum(map(len, photos)) == 158
    assert {photo.image.shape for of_subject in photos for photo in of_subject} == {(512, 512, 3)}
