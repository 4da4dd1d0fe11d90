"""Reads a user's folder of photos and their masks, and brings all of them to one form."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import ANY_TEXT, YES_OR_NO, setting, text
from catversion_jax.utils.types import Bool, UInt8

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PHOTOS = 100
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 100 * 10**6
IGNORED = ("thumbs.db", "desktop.ini")  # left in folders by file managers; dot files are ignored too


@dataclass(frozen=True)
class DataConfig:
    """The photos to train on."""

    dir: str = setting("", f"Folder of 1 to {MAX_PHOTOS} photos; train requires it.", text("a folder of photos"))
    masks_dir: str = setting(
        "", 'Folder of subject masks, matched by file stem; "" means DIR/masks if it exists.', ANY_TEXT
    )
    flip: bool = setting(True, "Mirror half of the photos drawn for training.", YES_OR_NO)


@dataclass(frozen=True)
class Photo:
    name: str  # the file's stem
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None  # True: the subject


def open_image(path: Path) -> Image.Image:
    """Opens an image, decoded and turned upright (EXIF). Raises UserError, naming the file, for anything else."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: empty file; expected a {', '.join(FORMATS)} image; remove or replace it")
    if size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {size >> 20} MiB; expected at most {MAX_FILE_BYTES >> 20} MiB; make it smaller")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width}x{image.height}; expected at most {MAX_PIXELS // 10**6} megapixels"
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a {', '.join(FORMATS)} image; remove or convert it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: damaged or truncated image ({error}); remove or replace it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: 16-bit grey is scaled, transparency is composited over white."""
    if image.mode.startswith("I"):  # 16-bit greyscale
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, resolution: int | None, resample: Image.Resampling) -> np.ndarray:
    """Returns the largest centred square, resized; without a resolution, the whole image as it is."""
    if resolution is None:
        return np.asarray(image)
    return np.asarray(ImageOps.fit(image, (resolution, resolution), resample))


def is_candidate(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.name.lower() not in IGNORED


def read_photos(
    folder: str | Path,
    resolution: int | None,
    masks_dir: str | Path = "",
    keys: tuple[str, str] = ("data.dir", "data.masks_dir"),
    most: int = MAX_PHOTOS,
    keep: Callable[[Path], bool] = is_candidate,
) -> list[Photo]:
    """Reads a folder's photos, sorted by name and cropped to squares of `resolution` pixels (None: as they are).

    A mask is an image of its photo's size and file stem (bright = subject) in `masks_dir`, by default in
    `<folder>/masks` if that exists. Raises UserError, naming the file, for a file that is not a photo and for a missing
    mask; `keys` are the names of the two folders' settings in these messages.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {keys[0]} takes a folder of 1 to {most} photos")
    paths = sorted(filter(keep, folder.iterdir()))
    if not 1 <= len(paths) <= most:
        raise UserError(f"{folder}: {len(paths)} photos; expected 1 to {most} {', '.join(FORMATS)} files")
    stems = [path.stem for path in paths]
    double = next((path for path in paths if stems.count(path.stem) > 1), None)
    if double:
        raise UserError(f"{double}: another photo has the same name but for its ending; rename one of them")
    masks = find_masks(folder, Path(masks_dir) if masks_dir else None, keys[1])
    return [read_photo(path, resolution, masks) for path in paths]


def find_masks(folder: Path, masks_dir: Path | None, key: str) -> dict[str, Path] | None:
    """Returns the masks by file stem, or None if there is no folder of masks."""
    if masks_dir is None:
        masks_dir = folder / "masks"
        if not masks_dir.is_dir():
            return None
    if not masks_dir.is_dir():
        raise UserError(f"{masks_dir}: no such folder; {key} takes a folder with a mask for each photo")
    return {path.stem: path for path in filter(is_candidate, masks_dir.iterdir())}


def read_photo(path: Path, resolution: int | None, masks: dict[str, Path] | None) -> Photo:
    image = open_image(path)
    pixels = fit(to_rgb(image), resolution, Image.Resampling.BICUBIC)
    if masks is None:
        return Photo(path.stem, pixels, None)
    if path.stem not in masks:
        raise UserError(f"{path}: no mask named {path.stem}.* among its masks; add one for every photo, or none at all")
    mask = to_rgb(open_image(masks[path.stem])).convert("L")
    if mask.size != image.size:
        raise UserError(f"{masks[path.stem]}: {mask.size} pixels; expected {image.size}, as its photo {path}")
    return Photo(path.stem, pixels, fit(mask, resolution, Image.Resampling.BOX) > 127)
