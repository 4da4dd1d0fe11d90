"""Photos as training would see them, before they are sent to be learned from."""

import base64
import io

import numpy as np
from PIL import Image

from catversion_jax.data.photo_checks import check_photos
from catversion_jax.data.photos import DataConfig, training_photos
from catversion_jax.evaluation.photo_masks import subject
from catversion_jax.service.requests import CheckAnswer, CheckedPhoto, PhotosForm
from catversion_jax.service.service import ConceptService
from catversion_jax.service.uploads import receive_photos
from catversion_jax.utils.paths import calling
from catversion_jax.utils.types import UInt8

SHOWN = 256
"""Pixels along a side of the pictures that are answered, at most."""


def checked_photos(service: ConceptService, form: PhotosForm) -> CheckAnswer:
    """Returns photos as training would see them, with warnings. Raises UserError for what is no photo."""
    with service.store.incoming() as folder:
        receive_photos(folder, form, service.limits)
        with calling(f"{folder}/", ""):
            data = DataConfig(dir=str(folder / "photos"), crop=service.config.data.crop)
            photos = training_photos(data, service.pipe.base.networks.resolution)
    return CheckAnswer(
        photos=[
            CheckedPhoto(
                image=data_url(photo.image),
                subject=None if (alone := subject(photo)) is None else data_url(alone),
                caption=photo.caption,
                warnings=warnings,
            )
            for photo, warnings in zip(photos, check_photos(photos), strict=True)
        ]
    )


def data_url(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Returns a picture as a URL that holds it."""
    small = Image.fromarray(image)
    small.thumbnail((SHOWN, SHOWN))
    file = io.BytesIO()
    small.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
