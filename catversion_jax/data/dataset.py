"""A run's photos as a TFDS dataset in ArrayRecord format, which a resumed run reads even if the originals are gone.

Images are PNG bytes in scalar features, because TFDS's Image feature needs TensorFlow.
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from catversion_jax.data.photos import Photo
from catversion_jax.utils.errors import UserError


def encode_png(array: np.ndarray | None) -> bytes:
    """Encodes an image or a mask as PNG bytes; None gives empty bytes."""
    if array is None:
        return b""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # tfds is untyped
    """One split, `train`, with the features name, image and mask (bytes; empty if there is no mask)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, photos: list[Photo] | None = None, **kwargs):
        self._photos = photos or []
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        scalar = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = tfds.features.FeaturesDict({"name": scalar, "image": scalar, "mask": scalar})
        return tfds.core.DatasetInfo(builder=self, features=features, description="Photos of one concept.")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for photo in self._photos:
            yield (
                photo.name,
                {"name": photo.name.encode(), "image": encode_png(photo.image), "mask": encode_png(photo.mask)},
            )


def write_dataset(folder: Path, photos: list[Photo]) -> None:
    """Writes the dataset, unless a complete one exists."""
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(compute_stats="skip", try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads
        Photos(photos, data_dir=folder).download_and_prepare(download_config=config)


def read_dataset(folder: Path) -> list[Photo]:
    """Returns the photos, sorted by name. Raises UserError if there is no complete dataset."""
    try:
        source = Photos(data_dir=folder).as_data_source("train")
        records = sorted((record["name"].decode(), record) for record in source)
    except Exception as error:  # TFDS and ArrayRecord raise types of their own
        raise UserError(
            f"{folder}: not a readable photo dataset ({error}); start the run anew in another run_dir"
        ) from error
    return [
        Photo(name, decode_png(record["image"]), decode_png(record["mask"]) if record["mask"] else None)
        for name, record in records
    ]
