"""Opens one image file: read within limits, decoded, upright, and in the colours of sRGB."""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from catversion_jax.utils.errors import UserError, is_storage_error, short
from catversion_jax.utils.files import MIB, open_regular
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, size_of

FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF")
KINDS = "JPEG, PNG, WEBP, HEIC or AVIF"
MAX_FILE_BYTES = 64 * MIB
MAX_PIXELS = 205 * 10**6
"""The largest image; phones and medium format cameras take photos of 100 and 200 megapixels."""
FULL_PIXELS = 100 * 10**6
"""Of a larger image, four pixels are averaged to one as it is read, so that it takes a gigabyte and not several."""
MAX_TEXT_BYTES = 64 * MIB
"""Of the texts in a PNG: image generators store whole workflows there."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what turns the image upright."""

ORIENTATION = 0x0112
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}
"""EXIF's types of whole numbers -> how `struct` reads them."""

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of an ICC profile -> Pillow's mode of the colours that it takes."""
SAME_COLOUR = 2
"""The largest difference, of 255, at which a profile counts as sRGB: it may have been rounded when it was written."""

HALF = 127
"""The largest brightness or opacity that is background."""
ALMOST_ALL = 0.995
"""The share from which on a mask says nothing: a stray point of the other kind is no subject."""

PILLOW = threading.Lock()


def open_photo(path: AnyPath) -> Image.Image:
    """Opens a photo as 8-bit sRGB, upright; transparency is composited over white. Raises UserError as `open_image`."""
    return open_cutout(path)[0]


def open_cutout(path: AnyPath) -> tuple[Image.Image, Image.Image | None]:
    """Opens a photo as `open_photo`, with the opacity of one whose background was removed; else with None."""
    image = open_image(path)
    with damage_named(path), our_limits():
        return to_rgb(to_srgb(image, path)), opacity(image)


def opacity(image: Image.Image) -> Image.Image | None:
    """Returns an image's opacity, 8-bit grey, if more than a stray point of it is transparent; else None."""
    image = eight_bits(image)
    if not image.has_transparency_data:
        return None
    channel = image.convert("RGBA").getchannel("A")
    # Less says nothing: lossy formats change an opaque channel a little, and an eraser may touch a mask.
    return channel if (np.asarray(channel) <= HALF).mean() > 1 - ALMOST_ALL else None


def given_photo(photo: AnyPath | Image.Image) -> Image.Image:
    """Returns a file's photo, or an image in memory, as `open_photo` gives it."""
    return in_srgb(photo) if isinstance(photo, Image.Image) else open_photo(photo)


def in_srgb(image: Image.Image) -> Image.Image:
    """Returns an image in memory as `open_photo` gives it from a file. Raises UserError if it cannot be converted."""
    name = Path("an image in memory")
    with damage_named(name), our_limits():
        image.load()
        return to_rgb(to_srgb(upright(image, name), name))


def open_image(path: AnyPath) -> Image.Image:
    """Opens an image, decoded and turned upright (EXIF). Raises UserError, naming the file, for anything else."""
    expected = f"expected a {KINDS} image"
    with open_regular(path, expected) as file:
        size = size_of(path)
        if size == 0:
            raise UserError(f"{path}: empty file; {expected}; remove or replace it")
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path}: {size // MIB} MiB; expected at most {MAX_FILE_BYTES // MIB} MiB; make it smaller")
        with damage_named(path), our_limits():
            register_heic()
            image: Image.Image = Image.open(file, formats=FORMATS)
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width}x{image.height}, {pixels / 10**6:.0f} megapixels; expected at most "
                    f"{MAX_PIXELS // 10**6}; make it smaller"
                )
            if pixels > FULL_PIXELS:
                image.draft(None, (image.width // 2, image.height // 2))  # JPEGs can be decoded at half their size
            image.load()
            return upright(halved(image) if image.width * image.height > FULL_PIXELS else image, path)


def kind_of_photo(path: AnyPath) -> tuple[str, int]:
    """Returns a file's format, one of FORMATS, and its number of pixels, which are not decoded.

    Raises UserError, naming the file, for anything but an image.
    """
    with open_regular(path, f"expected a {KINDS} image") as file, damage_named(path), our_limits():
        register_heic()
        image = Image.open(file, formats=FORMATS)
        return str(image.format), image.width * image.height


@cache
def register_heic() -> None:
    """Adds HEIC, which every iPhone writes, to what Pillow reads."""
    # Imported here: it takes a tenth of a second, and few commands open photos.
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)


@contextlib.contextmanager
def our_limits() -> Iterator[None]:
    """Replaces Pillow's limits by ours, and silences its Python warnings, while it reads or converts an image."""
    # Pillow's limits are global: they are put back, since another program may use Pillow too.
    with PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, MAX_TEXT_BYTES
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


@contextlib.contextmanager
def damage_named(path: AnyPath) -> Iterator[None]:
    """Raises UserError, naming the file, for whatever Pillow raises; a storage failure stays one."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a {KINDS} image; remove or convert it") from None
    except MemoryError:
        raise UserError(f"{path}: this machine has too little memory to decode it; make it smaller") from None
    # All types: damaged metadata make Pillow raise struct.error, ZeroDivisionError, AttributeError and others.
    except Exception as error:
        if is_storage_error(error):
            raise
        if "MAX_TEXT" in str(error):  # as Pillow names its limits
            raise UserError(
                f"{path}: a text or profile in it exceeds {MAX_TEXT_BYTES // MIB} MiB; save it without metadata"
            ) from error
        raise UserError(f"{path}: damaged or truncated image ({short(error)}); remove or replace it") from error


def halved(image: Image.Image) -> Image.Image:
    """Averages squares of four pixels."""
    plain = {"1": "L", "P": "RGBA" if image.has_transparency_data else "RGB"}.get(image.mode)
    small = (image.convert(plain) if plain else eight_bits(image)).reduce(2)
    small.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return small


def upright(image: Image.Image, path: AnyPath) -> Image.Image:
    """Turns an image as its EXIF or XMP data says; warns if they cannot be read."""
    # Not ImageOps.exif_transpose: it writes the other EXIF fields anew, and fails if one of them is damaged.
    try:
        orientation = exif_orientation(image.info.get("exif") or b"")
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1) if orientation is None else orientation)
    except Exception as error:  # of any type, as Pillow unpacks whatever is there
        warn(f"{path}: its EXIF data cannot be read ({short(error)}); it is taken as it is stored")
        return image
    return image if turn is None else image.transpose(turn)


def exif_orientation(exif: bytes) -> int | None:
    """Returns the orientation of EXIF data; None if it is not there as a whole number.

    Read here first: Pillow leaves out all fields behind one that is damaged.
    """
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return None
    with contextlib.suppress(struct.error):  # behind the end of the data
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (fields,) = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * fields, 12):
            tag, kind = struct.unpack_from(f"{order}HH", data, place)
            if tag == ORIENTATION and kind in WHOLE_NUMBERS:
                return struct.unpack_from(order + WHOLE_NUMBERS[kind], data, place + 8)[0]
    return None


def to_srgb(image: Image.Image, path: AnyPath) -> Image.Image:
    """Converts an image with an ICC profile to sRGB, in mode RGB or RGBA; one without, or of sRGB, is returned.

    A profile that cannot be used is ignored with a warning.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        return by_profile(image, profile)
    except Exception as error:  # Pillow raises PyCMSError, OSError and TypeError for damaged profiles
        warn(f"{path}: its colour profile cannot be used ({short(error)}); it is read as sRGB")
        return image


def by_profile(image: Image.Image, data: bytes) -> Image.Image:
    """Converts an image by an ICC profile. Raises ValueError for one that is of other colours than the image."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    space = profile.profile.xcolor_space.strip()
    mode = PROFILE_MODES.get(space)
    is_grey = image.mode[0] in "1LI"
    # A grey image may have an RGB profile, which then holds for its shade.
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not is_grey):
        raise ValueError(f"it is of {space} and the image of {image.mode}")
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB" and changes_nothing(transform):
        return image
    colours = transform.apply(eight_bits(image).convert(mode))
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours


def changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform of RGB leaves a grid of colours as they are."""
    shades = np.arange(0, 256, 51, dtype=np.uint8)
    grid = np.stack(np.meshgrid(shades, shades, shades), axis=-1).reshape(1, -1, 3)
    moved = np.asarray(transform.apply(Image.fromarray(grid)))
    return int(np.abs(moved.astype(int) - grid).max()) <= SAME_COLOUR


def eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; other images are returned."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: 16-bit grey is scaled, transparency is composited over white."""
    image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
