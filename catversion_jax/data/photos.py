"""Reads a user's folder of photos and their masks, and brings all of them to one form."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from catversion_jax.data.captions import captions_of, read_caption
from catversion_jax.data.images import HALF, KINDS, given_photo, open_cutout
from catversion_jax.data.photo_folder import split_folder, stem_of
from catversion_jax.data.photo_sources import is_listed, local_source, urls_of
from catversion_jax.data.subject_masks import find_masks, open_mask, warn_of_masks
from catversion_jax.utils.errors import UserError, listed, one_line
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, expand
from catversion_jax.utils.settings import ANY_TEXT, YES_OR_NO, one_of, setting, text
from catversion_jax.utils.types import Bool, UInt8

MAX_PHOTOS = 100
CROPS = ("subject", "center")


@dataclass(frozen=True)
class DataConfig:
    """The photos to train on."""

    dir: str = setting(
        "",
        f"Folder of 1 to {MAX_PHOTOS} photos, a .zip of one, or https:// URLs (also as lines of a .txt file); train "
        "requires it.",
        text("a folder of photos"),
    )
    masks_dir: str = setting(
        "", 'Folder of subject masks, matched by file stem; "" means DIR/masks if it exists.', ANY_TEXT
    )
    crop: str = setting(
        "subject",
        "Where a photo is cropped to its largest square: around the subject of its mask, if it has one, or the center.",
        one_of(CROPS),
    )
    captions: bool = setting(
        True,
        "Train a photo on the caption beside it (a.txt beside a.jpg) in place of the templates; it may hold their "
        "fields.",
        YES_OR_NO,
    )
    flip: bool = setting(True, "Mirror half of the photos drawn for training.", YES_OR_NO)


@dataclass(frozen=True)
class Photo:
    name: str  # the file's stem
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None  # True: the subject
    mask_file: str = ""  # folder and name of the mask's file; "": unknown
    size: tuple[int, int] = (0, 0)  # width and height before it was cropped; 0: unknown
    caption: str = ""  # its own prompt, with its fields unfilled; "": it has the templates' prompts


@dataclass(frozen=True)
class PhotoFile:
    """A photo that has not been read yet, and the files of its mask and its caption."""

    path: AnyPath
    mask: AnyPath | None
    caption: AnyPath | None

    @property
    def name(self) -> str:
        return stem_of(self.path)

    def read(self, resolution: int | None = None, crop: str = "center", cutout: bool = False) -> Photo:
        """Reads photo and mask, cropped to squares of `resolution` pixels (None: as they are).

        `crop` is one of CROPS. `cutout`: a photo without a mask's file is its own mask, if it has a background removed.
        """
        image, own = open_cutout(self.path)
        mask, file = (own if cutout else None), "its own opacity"
        if self.mask is not None:
            mask, file = open_mask(self.mask, image.size, self.path), f"{self.mask.parent.name}/{self.mask.name}"
        if mask is None:
            return Photo(self.name, fit(image, resolution, Image.Resampling.BICUBIC), None, size=image.size)
        centering = centering_on(np.asarray(mask) > HALF) if crop == "subject" else CENTER
        subject = fit(mask, resolution, Image.Resampling.BOX, centering) > HALF
        return Photo(self.name, fit(image, resolution, Image.Resampling.BICUBIC, centering), subject, file, image.size)


@dataclass(frozen=True)
class FolderRules:
    """What is expected of a folder: its settings' names for messages, the most photos, and which files count."""

    keys: tuple[str, str] = ("data.dir", "data.masks_dir")
    most: int = MAX_PHOTOS
    keep: Callable[[AnyPath], bool] = lambda _: True


CENTER = (0.5, 0.5)


def centering_on(subject: Bool[np.ndarray, "h w"]) -> tuple[float, float]:
    """Returns where the largest square goes, as Pillow's shares of the room that it has, to have the subject inside.

    The middle of the subject's box is in the square's middle, as far as the photo allows.
    """
    shares = []
    side = min(subject.shape)
    for size, axis in zip(subject.shape[::-1], (0, 1), strict=True):
        found = np.flatnonzero(subject.any(axis))
        room = size - side
        middle = (found[0] + found[-1] + 1) / 2 if len(found) else size / 2
        shares.append(float(np.clip((middle - side / 2) / room, 0, 1)) if room else 0.5)
    return shares[0], shares[1]


def fit(
    image: Image.Image,
    resolution: int | None,
    resample: Image.Resampling,
    centering: tuple[float, float] = CENTER,
) -> np.ndarray:
    """Returns the largest square, resized; without a resolution, the whole image as it is."""
    if resolution is None:
        return np.asarray(image)
    return np.asarray(ImageOps.fit(image, (resolution, resolution), resample, centering=centering))


def find_photos(
    folder: str | AnyPath, masks_dir: str | AnyPath = "", rules: FolderRules = FolderRules()
) -> list[PhotoFile]:
    """Returns a folder's photos, sorted by name, with their masks and captions, as files that have not been opened.

    Masks have the stem of their photo. They are in `masks_dir` or, if that is "", in `<folder>/masks` or beside the
    photos as <photo>-masklabel. Files that are none of these are left out with a warning. Raises UserError for two
    photos of one stem, and for a photo without a mask if another has one.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {rules.keys[0]} takes a folder of 1 to {rules.most} photos")
    files = split_folder(folder, rules.keep)
    expected = f"expected 1 to {rules.most} {KINDS} files"
    if not 1 <= len(files.photos) <= rules.most:
        others = f", and other files: {listed(path.name for path in files.others)}" if files.others else ""
        raise UserError(f"{folder}: {len(files.photos)} photos{others}; {expected}")
    if files.others:
        warn(f"{folder}: files that are no photos are not used: {listed(path.name for path in files.others)}")
    by_stem: dict[str, AnyPath] = {}
    for path in files.photos:
        if other := by_stem.get(stem_of(path)):
            raise UserError(f"{other}, {path}: another photo has the same name but for its ending; rename one of them")
        by_stem[stem_of(path)] = path
    masks = find_masks(folder, files, masks_dir, rules.keys[1], by_stem)
    captions = captions_of(files.photos, files.captions)
    if masks is None:
        return [PhotoFile(path, None, captions.get(path)) for path in files.photos]
    for stem, path in by_stem.items():
        if stem not in masks:
            raise UserError(f"{path}: no mask named {stem}.* among its masks; add one for every photo, or none at all")
    return [PhotoFile(path, masks[stem], captions.get(path)) for stem, path in by_stem.items()]


def read_photos(
    folder: str | AnyPath, resolution: int | None, masks_dir: str | AnyPath = "", rules: FolderRules = FolderRules()
) -> list[Photo]:
    """Reads the photos that `find_photos` finds, cropped to squares of `resolution` pixels (None: as they are).

    Raises UserError, naming the file, for a file that is not a photo; warns of masks that cover all or nothing.
    """
    photos = [file.read(resolution) for file in find_photos(folder, masks_dir, rules)]
    warn_of_masks(str(folder), mask_shares(photos))
    return photos


def training_photos(data: DataConfig, resolution: int) -> list[Photo]:
    """Reads the photos to train on, as `read_photos` does, from a folder or from any other source of photos.

    Photos whose background was removed are their own masks, if all are. They have their captions, unless
    `data.captions` is off.
    """
    with local_source(data.dir) as folder:
        found = find_photos(folder, data.masks_dir)
        photos = [file.read(resolution, data.crop, cutout=True) for file in found]
        if any(photo.mask is None for photo in photos):
            if cutouts := [photo.name for photo in photos if photo.mask is not None]:
                warn(f"{data.dir}: cutouts beside whole photos count as whole, too: {listed(cutouts)}")
            photos = [file.read(resolution) for file in found] if cutouts else photos
        if data.captions:
            captions = [read_caption(file.caption) if file.caption else "" for file in found]
            photos = [replace(photo, caption=text) for photo, text in zip(photos, captions, strict=True)]
    warn_of_masks(data.dir, mask_shares(photos))
    return photos


def given_photos(photos: Sequence[str | AnyPath | Image.Image], resolution: int) -> list[Photo]:
    """Reads files, or takes images in memory, cropped to squares of `resolution` pixels; without masks.

    They are named by their place. Raises UserError for none, for too many, and for a file that is not a photo.
    """
    if not 1 <= len(photos) <= MAX_PHOTOS:
        raise UserError(f"{len(photos)} photos; expected 1 to {MAX_PHOTOS}")

    def read(photo: str | AnyPath | Image.Image) -> np.ndarray:
        image = given_photo(photo if isinstance(photo, Image.Image) else expand(photo))
        return fit(image, resolution, Image.Resampling.BICUBIC)

    return [Photo(f"{i:03}", read(photo), None) for i, photo in enumerate(photos)]


def mask_shares(photos: Iterable[Photo]) -> dict[str, float]:
    """Returns the share of each photo that its mask covers, by name; photos without a mask are left out."""
    return {photo.name: float(photo.mask.mean()) for photo in photos if photo.mask is not None}


def describe_count(photos: Sequence[Photo]) -> str:
    """Says how many photos there are, and how many of them have masks and captions."""
    parts = {"masks": [photo.mask is not None for photo in photos], "captions": [bool(p.caption) for p in photos]}
    return ", ".join([str(len(photos)), *(f"{sum(has)} with {what}" for what, has in parts.items() if any(has))])


def describe_masks(photos: Sequence[Photo]) -> list[str]:
    """Returns a line for each photo with a mask: which file it is, and the share that it covers."""
    return [
        one_line(f"mask of {photo.name}: {photo.mask_file or 'stored with the run'}, covers {photo.mask.mean():.1%}")
        for photo in photos
        if photo.mask is not None
    ]


class PhotoCount(NamedTuple):
    photos: int
    captions: int


NOTHING = PhotoCount(0, 0)


def count_photos(data: DataConfig) -> PhotoCount:
    """Counts the photos of a source, and their captions, at most MAX_PHOTOS; none if it cannot be listed."""
    with contextlib.suppress(UserError, OSError):
        if is_listed(data.dir):
            return PhotoCount(min(MAX_PHOTOS, len(urls_of(data.dir))), 0)
    with contextlib.suppress(UserError, OSError), local_source(data.dir, contents=False) as folder:
        files = split_folder(folder)
        captions = len(files.captions) if data.captions else 0
        return PhotoCount(min(MAX_PHOTOS, len(files.photos)), min(MAX_PHOTOS, captions))
    return NOTHING
