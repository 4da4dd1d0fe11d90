"""Pictures of other sizes than the model's own; the UNet's numbers at these are compared in tests/parity."""

import numpy as np
import pytest
from PIL import Image

import catversion_jax as cv
from catversion_jax.sampling.picture_record import read_picture
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of


def test_the_command(concepts, tmp_path):
    """One concept and two, whose regions are found at that size; a picture of that size is made again."""
    for name, given in {"one": concepts[:1], "two": concepts}.items():
        flags = [*(f"--embedding={path}" for path in given), "--prompt=a teapot and a dog", "--num=1", "--steps=2"]
        catversion("generate", *flags, "--width=26", "--height=14", f"--out={tmp_path / name}")
        (picture,) = (tmp_path / name).glob("*_0.png")
        image = Image.open(picture)
        assert image.size == (26, 14)
        assert np.asarray(image).std() > 1
        record = read_picture(picture)
        assert (record.width, record.height) == (26, 14)
        assert "Size: 26x14" in image.info["parameters"]
        catversion("generate", f"--like={picture}", f"--out={tmp_path / 'again'}")
        assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
        assert Image.open(tmp_path / name / "grid.png").height > 128


def test_the_models_own_size_is_the_default(concepts, tiny_model):
    pipe, teapot = cv.Pipeline.from_pretrained(tiny_model), cv.Concept.load(concepts[0])
    own, given = (pipe("a teapot", teapot, steps=2, **size)[0] for size in ({}, {"width": 16, "height": 16}))
    np.testing.assert_array_equal(own, given)
    (wide,) = pipe("a teapot", teapot, steps=2, width=32)
    assert wide.size == (32, 16)
    for size, message in {
        (15, 16): "width=15: expected a multiple of 2, at most 4096",
        (16, -2): "height=-2",
        (16, 4098): "height=4098",
    }.items():
        with pytest.raises(UserError, match=message):
            pipe("a teapot", teapot, steps=2, width=size[0], height=size[1])


def test_mistakes(concepts, tmp_path):
    given = ["generate", f"--embedding={concepts[0]}", "--prompt=a teapot", f"--out={tmp_path / 'out'}"]
    assert "width=17: expected a multiple of 2" in error_of(*given, "--width=17")
    assert "height=8000" in error_of(*given, "--height=8000")
