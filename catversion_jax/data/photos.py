"""Read a user's folder of photos, and masks, whatever they come as."""

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
IGNORED = ("thumbs.db", "desktop.ini")  # what file managers leave in a folder of images; dot files too


@dataclass(frozen=True)
class DataConfig:
    """The photos to train on."""

    dir: str = setting("", f"a folder of 1 to {MAX_PHOTOS} photos; required", text("a folder of photos"))
    masks_dir: str = setting("", 'the subject\'s masks, matched by file stem; "": <dir>/masks if it exists', ANY_TEXT)
    flip: bool = setting(True, "half of the photos are seen as their mirror image", YES_OR_NO)


@dataclass(frozen=True)
class Photo:
    name: str  # the file's stem
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None  # True: the subject


def open_image(path: Path) -> Image.Image:
    """A decoded, upright image. Raises UserError naming the file for anything else."""
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
        raise UserError(f"{path}: damaged or truncated image ({error}); remove or replace it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey is scaled, transparency is laid over white."""
    if image.mode.startswith("I"):  # 16-bit greyscale
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, resolution: int | None, resample: Image.Resampling) -> np.ndarray:
    """The largest centred square, resized; without a resolution, all of it as it is."""
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
    """The folder's photos by name, cut to squares of `resolution` pixels (None: as they are), with their masks.

    Masks are images of the photo's shape (bright = subject) in `masks_dir`, or `<folder>/masks` where that exists,
    with the photo's stem. Raises UserError naming the file for whatever is not a photo, and for a missing mask; `keys`
    are what the two folders are called there.
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
    """The masks by stem; None where there are none."""
    if masks_dir is None and not (masks_dir := folder / "masks").is_dir():
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
