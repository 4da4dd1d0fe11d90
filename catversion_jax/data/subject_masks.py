"""Masks of the subject in photos, as files: which photo each belongs to, and what it says.

A mask of which more than a stray point is transparent is read by its opacity, and what is opaque is the subject: so
background removers and editors save cutouts. Any other mask is read by its brightness, and what is bright is the
subject.
"""

from collections.abc import Collection, Iterable

from PIL import Image

from catversion_jax.data.images import ALMOST_ALL, damage_named, eight_bits, opacity, open_image, our_limits
from catversion_jax.data.photo_folder import FolderFiles, photo_of_mask, split_folder
from catversion_jax.utils.errors import UserError, listed, refused
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, entries, expand, is_same

FOLDER_NAMES = ("mask", "masks")
"""Names of a folder of masks inside the folder of photos, in any case."""


def find_masks(
    folder: AnyPath, files: FolderFiles, masks_dir: str | AnyPath, key: str, photos: Collection[str]
) -> dict[str, AnyPath] | None:
    """Returns the masks by their photos' stems; None if there are none.

    They are in `masks_dir` or, if that is "", in a sub-folder of FOLDER_NAMES and beside the photos. `key` is the name
    of the folder's setting. Masks without a photo are left out with a warning. Raises UserError for two masks of one
    photo, and for two folders of masks.
    """
    masks_folder = expand(masks_dir) if masks_dir else mask_folder(folder)
    paths = [] if masks_dir else list(files.masks)
    if masks_folder is None:
        return paired(paths, photos) or None
    if not masks_folder.is_dir():
        raise UserError(f"{masks_folder}: no such folder; {key} takes a folder with a mask for each photo")
    if is_same(masks_folder, folder):
        raise UserError(f"{masks_folder}: the folder of the photos themselves; {key} takes one of masks alone")
    inside = split_folder(masks_folder)
    return paired([*paths, *inside.photos, *inside.masks], photos)


def mask_folder(folder: AnyPath) -> AnyPath | None:
    """Returns the folder of masks inside a folder of photos, if there is one. Raises UserError for several."""
    with refused(f"{folder}: cannot be listed", "expected a folder that you may read"):
        inside = entries(folder)
    found = [path for path, is_folder in inside if is_folder and path.name.lower() in FOLDER_NAMES]
    if len(found) > 1:
        raise UserError(f"{found[0]}, {found[1]}: two folders of masks; expected one; remove or rename the other")
    return found[0] if found else None


def paired(paths: Iterable[AnyPath], photos: Collection[str]) -> dict[str, AnyPath]:
    """Returns the masks by their photos' stems. Raises UserError if a photo has two."""
    found: dict[str, AnyPath] = {}
    alone = []
    for path in paths:
        stem = photo_of_mask(path, photos)
        if stem is None:
            alone.append(path)
        elif stem in found:
            raise UserError(f"{found[stem]}, {path}: two masks of the photo {stem}; expected one; remove the other")
        else:
            found[stem] = path
    if alone:
        warn(f"{alone[0].parent}: masks of no photo are not used: {listed(path.name for path in alone)}")
    return found


def open_mask(path: AnyPath, size: tuple[int, int], photo: AnyPath) -> Image.Image:
    """Opens a mask as 8-bit grey, in which more than HALF is the subject.

    Raises UserError, naming the file, if it is not of `size`, which is the photo's.
    """
    image = open_image(path)
    if image.size != size:
        raise UserError(f"{path}: {image.size} pixels; expected {size}, as its photo {photo}")
    with damage_named(path), our_limits():
        return grey_of_mask(image)


def grey_of_mask(image: Image.Image) -> Image.Image:
    """Returns a mask as 8-bit grey: its opacity or, if it is opaque, its brightness."""
    return opacity(image) or eight_bits(image).convert("RGB").convert("L")


def warn_of_masks(folder: str, shares: dict[str, float]) -> None:
    """Warns of masks that cover all or nothing of their photos; `shares` has what each covers, by name."""
    says = {
        "all of their photos, so they say nothing": lambda covered: covered >= ALMOST_ALL,
        "nothing, as no subject in them is bright or opaque": lambda covered: covered <= 1 - ALMOST_ALL,
    }
    for meaning, holds in says.items():
        if names := [name for name, covered in shares.items() if holds(covered)]:
            warn(f"{folder}: these masks cover {meaning}; correct them: {listed(names)}")
