"""One image file: whatever is wrong with it is one line with its name; its colours are those that a viewer shows."""

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from catversion_jax.data import images
from catversion_jax.data.images import open_image, open_photo
from catversion_jax.data.photos import read_photos
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import MIB

RED, BLUE = (200, 20, 20), (20, 20, 200)


def two_halves(width: int = 80, height: int = 60) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def ifd(*entries: bytes) -> bytes:
    """EXIF data of one directory, little-endian, as a JPEG holds them; rationals point to 0/0 behind it."""
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(entries) + struct.pack("<I", 0) + bytes(8)


def field(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


TURNED = field(0x0112, 3, 1, 6)  # to be turned by 90 degrees to the right


@pytest.mark.parametrize(
    "entries",
    [
        (TURNED,),
        (field(0x010F, 5, 1, 8 + 2 + 24 + 4), TURNED),  # a maker that is a rational of 0/0
        (TURNED, field(0x011A, 5, 1, 8 + 2 + 24 + 4)),  # a resolution of 0/0
        (field(0x010F, 2, 2**31, 2**30), TURNED),  # a text of two gigabytes
        (field(0x010F, 12, 1, 2**30), TURNED),  # a number behind the end
        (TURNED, field(0x8769, 4, 1, 8)),  # a directory in itself
        (TURNED, field(0x9999, 99, 1, 1)),  # of no type
    ],
    ids=["plain", "maker", "resolution", "long", "behind", "loop", "no-type"],
)
def test_exif_with_bad_fields_turns_all_the_same(tmp_path, entries):
    two_halves().save(tmp_path / "a.jpg", exif=ifd(*entries))
    image = np.asarray(open_photo(tmp_path / "a.jpg"))
    assert image.shape == (80, 60, 3)
    np.testing.assert_allclose(image[10, 30], RED, atol=12)
    np.testing.assert_allclose(image[70, 30], BLUE, atol=12)


@pytest.mark.parametrize("orientation", range(9))
def test_every_orientation_is_pillows(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(open_photo(tmp_path / "a.png")), np.asarray(expected))


ERRORS = (
    struct.error("argument out of range"), OverflowError("too big"), ZeroDivisionError("0"), KeyError("x"),
    RecursionError("deep"), MemoryError(), AttributeError("encode"), IndexError("i"), TypeError("t"),
)  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["load", "getexif", "convert"])
def test_whatever_pillow_raises_is_one_line(tmp_path, monkeypatch, caplog, error, where):
    two_halves().convert("L").save(tmp_path / "a.png")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"PIL.{'PngImagePlugin.PngImageFile' if where == 'load' else 'Image.Image'}.{where}", fail)
    if where == "getexif":
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.getexif", fail)
        assert open_image(tmp_path / "a.png").size == (80, 60)
        assert f"{tmp_path / 'a.png'}: its EXIF data cannot be read" in caplog.text
        return
    with pytest.raises(UserError, match=r"a\.png: (damaged or truncated image|this machine has too little memory)"):
        open_photo(tmp_path / "a.png")


@pytest.fixture(scope="module")
def display_p3() -> bytes:
    """A profile of Display P3's primaries and sRGB's curve, written by hand: no program's file is copied."""
    return rgb_profile([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)])


SRGB = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
"""Its primaries, XYZ at D50."""


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def curve(gamma: float | None) -> bytes:
    """A power, or sRGB's curve."""
    if gamma is None:
        return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + fixed(gamma)


def icc_profile(space: bytes, blocks: dict[str, bytes]) -> bytes:
    """An ICC profile of a display, version 4, of a colour space and its tags."""
    text = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 4, 28) + "ab".encode("utf-16-be")
    blocks = {"desc": text, "cprt": text, "wtpt": xyz((0.9642, 1, 0.8249))} | blocks
    table, body, offset = b"", b"", 128 + 4 + 12 * len(blocks)
    for name, data in blocks.items():
        padded = data + bytes(-len(data) % 4)
        table += struct.pack(">4sII", name.encode(), offset + len(body), len(data))
        body += padded
    names = struct.pack(">I4sI4s4s4s12s4s", offset + len(body), bytes(4), 0x04300000, b"mntr", space, b"XYZ ",
                        bytes(12), b"acsp")  # fmt: skip
    head = (names.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0")
    return head + struct.pack(">I", len(blocks)) + table + body


def rgb_profile(primaries: list[tuple[float, float, float]], gamma: float | None = None) -> bytes:
    blocks = {f"{colour}XYZ": xyz(values) for colour, values in zip("rgb", primaries, strict=True)}
    return icc_profile(b"RGB ", blocks | {f"{colour}TRC": curve(gamma) for colour in "rgb"})


def grey_profile(gamma: float) -> bytes:
    return icc_profile(b"GRAY", {"kTRC": curve(gamma)})


def test_display_p3(tmp_path, display_p3):
    """The colours of the fixture in ../shared/cases: (184, 55, 47) of P3 is the red that sRGB calls (200, 40, 40)."""
    Image.new("RGB", (8, 8), (184, 55, 47)).save(tmp_path / "a.png", icc_profile=display_p3)
    np.testing.assert_allclose(np.asarray(open_photo(tmp_path / "a.png"))[0, 0], (200, 40, 40), atol=3)

    clear = Image.new("RGBA", (8, 8), (184, 55, 47, 0))
    clear.paste((184, 55, 47, 255), (0, 0, 4, 8))
    clear.save(tmp_path / "b.png", icc_profile=display_p3)
    image = np.asarray(open_photo(tmp_path / "b.png"))
    np.testing.assert_allclose(image[0, 0], (200, 40, 40), atol=3)
    np.testing.assert_array_equal(image[0, 7], 255)
    Image.new("P", (8, 8)).save(tmp_path / "c.png", icc_profile=display_p3)
    np.testing.assert_array_equal(np.asarray(open_photo(tmp_path / "c.png")), 0)


@pytest.mark.parametrize("profile", [rgb_profile(SRGB, 1.8), grey_profile(1.8)], ids=["rgb", "grey"])
def test_profiles_of_a_grey_image(tmp_path, profile):
    """A power of 1.8: its 128 is brighter in sRGB."""
    expected = 255 * (1.055 * ((128 / 255) ** 1.8) ** (1 / 2.4) - 0.055)
    grey = {
        "L": Image.new("L", (8, 8), 128),
        "LA": Image.new("LA", (8, 8), (128, 255)),
        "I;16": Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)),
    }
    for mode, image in grey.items():
        image.save(tmp_path / "a.png", icc_profile=profile)
        np.testing.assert_allclose(np.asarray(open_photo(tmp_path / "a.png")), expected, atol=2, err_msg=mode)


def test_adobe_rgb(tmp_path):
    """Its green lies outside sRGB: (0, 255, 0) is sRGB's, whose red is negative; grey moves by the curves alone."""
    adobe = [(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)]
    profile = rgb_profile(adobe, 563 / 256)
    linear = (np.asarray((150, 100, 60)) / 255) ** (563 / 256) @ np.asarray(adobe) @ np.linalg.inv(np.asarray(SRGB))
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    Image.new("RGB", (8, 8), (150, 100, 60)).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_allclose(np.asarray(open_photo(tmp_path / "a.png"))[0, 0], expected, atol=2)
    Image.new("RGB", (8, 8), (0, 255, 0)).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_allclose(np.asarray(open_photo(tmp_path / "a.png"))[0, 0], (0, 255, 0), atol=2)


def test_srgb_stays_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(open_photo(tmp_path / "a.png")), pixels)


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", lambda _: b"no profile"),
        ("RGB", lambda good: good[:300]),
        ("RGB", lambda good: good[:128] + bytes(len(good) - 128)),
        ("RGB", lambda _: lab_profile()),
        ("CMYK", lambda good: good),
        ("RGB", lambda _: grey_profile(1.8)),
    ],
    ids=["text", "cut", "zeros", "lab", "rgb-of-cmyk", "grey-of-rgb"],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_warning(tmp_path, caplog, display_p3, mode, profile):
    image = two_halves().convert(mode)
    path = tmp_path / f"a.{'png' if mode == 'RGB' else 'jpg'}"
    image.save(path)
    plain = np.asarray(open_photo(path))
    image.save(path, icc_profile=profile(display_p3))
    np.testing.assert_array_equal(np.asarray(open_photo(path)), plain)
    assert f"{path}: its colour profile cannot be used" in caplog.text


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of black pixels, 1 bit each, with further chunks."""
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_long_texts_in_a_png_are_read_over(tmp_path):
    """As image generators write them: megabytes of a workflow, compressed or not, before the pixels or behind."""
    text = b"prompt\0\0" + zlib.compress(bytes(range(32, 127)) * (3 * MIB // 95))
    (tmp_path / "a.png").write_bytes(png_of(8, 8, chunk(b"zTXt", text), chunk(b"tEXt", b"a\0" + b"x" * 2 * MIB)))
    assert open_image(tmp_path / "a.png").size == (8, 8)
    bomb = b"prompt\0\0" + zlib.compress(bytes(65 * MIB))
    (tmp_path / "b.png").write_bytes(png_of(8, 8, chunk(b"zTXt", bomb)))
    with pytest.raises(UserError, match=r"b\.png: a text or profile in it exceeds 64 MiB; save it without metadata"):
        open_image(tmp_path / "b.png")
    assert PngImagePlugin.MAX_TEXT_CHUNK == MIB  # Pillow's own limits are back
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_a_limit_is_called_a_limit(tmp_path, monkeypatch, recwarn):
    (tmp_path / "a.png").write_bytes(png_of(20_000, 15_000))
    with pytest.raises(UserError, match=r"a\.png: 20000x15000, 300 megapixels; expected at most 205; make it smaller"):
        open_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    with pytest.raises(UserError, match=r"a\.png: 0 MiB; expected at most 0 MiB; make it smaller"):
        open_image(tmp_path / "a.png")
    assert not recwarn.list


def test_two_hundred_megapixels_are_read(tmp_path, recwarn):
    """As phones take them, also as 1 bit here: Pillow alone calls them a bomb."""
    (tmp_path / "a.png").write_bytes(png_of(16_320, 12_240))
    (photo,) = read_photos(tmp_path, 16)
    np.testing.assert_array_equal(photo.image, 0)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
def test_a_huge_image_is_halved_as_it_is_read(tmp_path, monkeypatch, mode):
    """With a mask of its size, and turned as its EXIF data say; the colours stay."""
    exif = ifd(TURNED)
    halves = two_halves(80, 60)
    image = Image.fromarray(np.asarray(halves.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else halves
    path = tmp_path / f"a.{'jpg' if mode in ('RGB', 'CMYK') else 'png'}"
    (image if mode == "I;16" else halves.convert(mode)).save(path, exif=exif)
    (tmp_path / "masks").mkdir()
    Image.new("1", (60, 80), 1).save(tmp_path / "masks" / "a.png")
    (whole,) = read_photos(tmp_path, None)
    monkeypatch.setattr(images, "FULL_PIXELS", 80 * 60 - 1)
    (half,) = read_photos(tmp_path, None)
    assert whole.image.shape == (80, 60, 3)
    assert half.image.shape == (40, 30, 3)
    assert half.mask.all()
    means = np.asarray(whole.image, float).reshape(40, 2, 30, 2, 3).mean((1, 3))
    assert np.abs(half.image - means).mean() < 2  # a JPEG's edge between colours is blurred


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: not a regular file"):
        open_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png: cannot be read \(No such file or directory\)"):
        open_image(tmp_path / "b.png")


def test_damage_anywhere_is_one_line(tmp_path):
    """A JPEG with EXIF data and a profile, of which random bytes are turned: read, or refused in a line."""
    buffer = io.BytesIO()
    exif = ifd(TURNED, field(0x011A, 5, 1, 38), field(0x8769, 4, 1, 8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    two_halves().save(buffer, "JPEG", exif=exif, icc_profile=profile)
    good = np.frombuffer(buffer.getvalue(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = good.copy()
        places = rng.integers(2, len(data), rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        (tmp_path / "a.jpg").write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)].tobytes())
        with contextlib.suppress(UserError):
            open_photo(tmp_path / "a.jpg")
