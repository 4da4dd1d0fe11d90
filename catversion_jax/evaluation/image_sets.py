"""Images to score, of any sizes, with the masks of their subjects if there are any: in memory, or read one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from catversion_jax.data.photos import Photo, PhotoFile
from catversion_jax.evaluation.masks import fill_background
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.types import Bool, UInt8

MaskedImage = tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"] | None]
"""An image, and the mask of its subject if there is one."""


@dataclass(frozen=True)
class MaskedImages:
    """Images in memory."""

    images: Sequence[UInt8[np.ndarray, "h w 3"]]
    masks: Sequence[Bool[np.ndarray, "h w"]] | None

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[MaskedImage]:
        masks = self.masks or repeat(None, len(self.images))
        return zip(self.images, masks, strict=True)

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def selected(self, index: Sequence[int]) -> "MaskedImages":
        """Some of the images, with their masks."""
        masks = None if self.masks is None else [self.masks[i] for i in index]
        return MaskedImages([self.images[i] for i in index], masks)

    def masked(self) -> list[UInt8[np.ndarray, "h w 3"]]:
        return [fill_background(image, mask) for image, mask in zip(self.images, self.masks or (), strict=True)]

    def backgrounds(self) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Returns the images with the subject filled."""
        return [fill_background(image, ~mask) for image, mask in zip(self.images, self.masks or (), strict=True)]


@dataclass(frozen=True)
class StoredImages:
    """Images in files, each read when it is needed and not kept: thousands of photos would not fit in memory."""

    files: Sequence[PhotoFile]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[MaskedImage]:
        """Reads the images in turn. Raises UserError for one that cannot be read, or whose mask is empty."""
        for file in self.files:
            photo = file.read()
            check_subject(photo)
            yield photo.image, photo.mask

    @property
    def has_masks(self) -> bool:
        return self.files[0].mask is not None

    def selected(self, index: Sequence[int]) -> "StoredImages":
        """Some of the images, with their masks."""
        return StoredImages([self.files[i] for i in index])


ImageSet = MaskedImages | StoredImages


def masked_images(photos: Sequence[Photo]) -> MaskedImages:
    """Returns the photos with their masks, which all or none of them have. Raises UserError for an empty mask."""
    for photo in photos:
        check_subject(photo)
    masks = [photo.mask for photo in photos if photo.mask is not None]
    return MaskedImages([photo.image for photo in photos], masks or None)


def check_subject(photo: Photo) -> None:
    """Raises UserError if the mask of a photo is empty."""
    if photo.mask is not None and not photo.mask.any():
        file = photo.mask_file or "its mask"
        raise UserError(f"{photo.name}: {file} shows no subject; expected it bright on black, or cut out; correct it")
