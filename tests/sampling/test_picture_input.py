"""Image to image and inpainting; the numbers are compared with diffusers' pipelines in tests/parity."""

import numpy as np
import pytest
from PIL import Image

import catversion_jax as cv
from catversion_jax.data import concept_sets
from catversion_jax.sampling.picture_record import read_picture
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of

PHOTO = sorted((concept_sets.SHIPPED / "teapot" / "train").glob("*.png"))[0]
MASK = concept_sets.SHIPPED / "teapot" / "train_masks" / PHOTO.name


@pytest.fixture
def concept(concepts):
    return concepts[0]


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return cv.Pipeline.from_pretrained(tiny_model)


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


@pytest.mark.parametrize("scheduler", ["pndm", "dpmpp_2m"])
def test_more_denoising_changes_more(mini, scheduler):
    """With the mini model, whose VAE gives a picture back: from nearly the same to another one."""
    pipe, photo = cv.Pipeline(cv.Pipeline.from_pretrained().model, mini), Image.open(PHOTO).convert("RGB")
    small = photo.resize((64, 64), Image.Resampling.BICUBIC)
    drawn = [
        pipe("a photo of a teapot", image=photo, denoise=share, steps=6, scheduler=scheduler, batch_size=1)[0]
        for share in (0.2, 0.5, 1.0)
    ]
    changes = [difference(image, small) for image in drawn]
    assert changes[0] < changes[1] < changes[2]
    assert changes[0] < 0.8 * changes[2]


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("denoise", [0.5, 1.0])
def test_outside_the_mask_nothing_changes(pipe, scheduler, denoise):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (32, 24, 3), np.uint8))
    inside = np.zeros((32, 24), bool)
    inside[5:19, 3:11] = True
    given = {"image": photo, "mask": Image.fromarray(inside), "denoise": denoise, "scheduler": scheduler, "steps": 4}
    first, second = (np.asarray(pipe("a teapot", seed=seed, width=24, height=32, **given)[0]) for seed in (0, 1))
    for drawn in (first, second):
        np.testing.assert_array_equal(drawn[~inside], np.asarray(photo)[~inside])
        assert difference(drawn[inside], np.asarray(photo)[inside]) > 5
    assert difference(first[inside], second[inside]) > 1


def test_a_mask_of_all_is_as_none(pipe):
    photo = Image.open(PHOTO).convert("RGB")
    given = {"image": photo, "denoise": 0.5, "steps": 4}
    whole, masked = (pipe("a teapot", **given, **mask)[0] for mask in ({}, {"mask": Image.new("L", photo.size, 255)}))
    assert difference(whole, masked) < 0.5


def test_the_command(concept, tmp_path):
    """The picture keeps its shape; it says how it was made, and is made again from that."""
    photo = Image.open(PHOTO).convert("RGB").crop((0, 0, 128, 80))
    photo.save(tmp_path / "photo.jpg")
    Image.open(MASK).crop((0, 0, 128, 80)).save(tmp_path / "mask.png")
    given = [f"--embedding={concept}", "--prompt=a teapot", "--num=2", "--steps=4", f"--out={tmp_path / 'out'}"]
    given.append(f"--image={tmp_path / 'photo.jpg'}")
    catversion("generate", *given, "--denoise=0.5")
    catversion("generate", *given, f"--image_mask={tmp_path / 'mask.png'}")
    found = sorted((tmp_path / "out").glob("a-teapot_*_1.png"), key=lambda path: read_picture(path).denoise)
    assert [read_picture(path).denoise for path in found] == [0.5, 0.7]
    assert "Denoising strength: 0.5" in Image.open(found[0]).info["parameters"]
    for picture in found:
        assert Image.open(picture).size == (26, 16)
        assert str(tmp_path).encode() not in picture.read_bytes()
        catversion("generate", f"--like={picture}", f"--out={tmp_path / 'again'}")
        assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    (tmp_path / "again" / ".sources.json").unlink()
    said = error_of("generate", f"--like={tmp_path / 'again' / found[0].name}", f"--embedding={concept}")
    assert "began as a picture of which its folder does not say where it is; give --image" in said


def test_like_and_pictures_to_start_from(concept, tmp_path):
    """A changed file is not taken for the old one; another picture may be given, with no mask of the old one."""
    photo = tmp_path / "photo.png"
    Image.open(PHOTO).save(photo)
    given = [f"--embedding={concept}", "--prompt=a teapot", "--num=1", "--steps=4", f"--out={tmp_path / 'out'}"]
    catversion("generate", *given, f"--image={photo}", f"--image_mask={MASK}", "--denoise=0.5")
    (picture,) = (tmp_path / "out").glob("a-teapot_*_0.png")
    Image.new("RGB", (96, 96)).save(tmp_path / "other.png")
    other = [f"--like={picture}", f"--image={tmp_path / 'other.png'}", f"--out={tmp_path / 'other'}"]
    catversion("generate", *other)
    (drawn,) = (tmp_path / "other").glob("a-teapot_*_0.png")
    assert read_picture(drawn).denoise == 0.5
    assert read_picture(drawn).start != read_picture(picture).start
    Image.new("RGB", (128, 128), "red").save(photo)
    assert "another picture by now than the one that was drawn anew" in error_of("generate", f"--like={picture}")
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / picture.name
    moved.write_bytes(picture.read_bytes())
    again = [f"--like={moved}", f"--embedding={concept}", f"--image={PHOTO}", f"--image_mask={MASK}"]
    catversion("generate", *again, f"--out={tmp_path / 'again'}")
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()


def test_images_in_memory(pipe):
    """As they come: nothing given, turned by their EXIF data, thin masks, and what is no picture."""
    same = [np.asarray(pipe("a teapot", steps=2, image=None, mask=None, denoise=None)[0]), pipe("a teapot", steps=2)[0]]
    np.testing.assert_array_equal(*same)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 8, 16))  # the bottom, once it is turned upright
    photo.getexif()[0x0112] = 8
    drawn = np.asarray(pipe("a teapot", image=photo, mask=mask, steps=4, width=16, height=32)[0])
    upright = np.asarray(photo.transpose(Image.Transpose.ROTATE_90))
    np.testing.assert_array_equal(drawn[:24], upright[:24])
    assert difference(drawn[24:], upright[24:]) > 5
    thin = Image.new("L", (256, 256))
    thin.paste(255, (100, 0, 101, 256))
    pipe("a teapot", image=Image.new("RGB", (256, 256)), mask=thin, steps=2)
    with pytest.raises(UserError, match="a ndarray as a picture; expected"):
        pipe("a teapot", image=np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"a picture of \(9000, 9\) would become .*; give its width and height"):
        pipe("a teapot", image=Image.new("RGB", (9000, 9)))


def test_mistakes(concept, pipe, tmp_path):
    given = ["generate", f"--embedding={concept}", "--prompt=a teapot", f"--out={tmp_path / 'out'}", "--steps=4"]
    assert "--denoise: of --image, which is missing" in error_of(*given, "--denoise=0.5")
    assert "--image_mask: of --image, which is missing" in error_of(*given, f"--image_mask={MASK}")
    given.append(f"--image={PHOTO}")
    assert "leaves none of the 4 steps" in error_of(*given, "--denoise=0.2")
    assert "denoise=0.0: expected more than 0" in error_of(*given, "--denoise=0")
    assert "none.png" in error_of(*given[:-1], "--image=none.png")
    Image.new("L", (5, 5), 255).save(tmp_path / "small.png")
    assert "small.png: (5, 5) pixels; expected (128, 128)" in error_of(*given, f"--image_mask={tmp_path / 'small.png'}")
    Image.new("L", (128, 128)).save(tmp_path / "empty.png")
    assert "nothing in it, cut to 16x16, is bright" in error_of(*given, f"--image_mask={tmp_path / 'empty.png'}")
    with pytest.raises(UserError, match="mask: of image, which is missing"):
        pipe("a teapot", mask=Image.open(MASK))
    with pytest.raises(UserError, match=r"mask: \(3, 3\) pixels; expected \(128, 128\)"):
        pipe("a teapot", image=PHOTO, mask=Image.new("L", (3, 3), 255), steps=2)
