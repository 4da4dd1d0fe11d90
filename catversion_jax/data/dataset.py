"""A run's photos as a TFDS dataset in ArrayRecord format, which a resumed run reads even if the originals are gone.

Images are PNG bytes in scalar features, because TFDS's Image feature needs TensorFlow. A digest of all examples lies
beside the dataset: what is read is what was written.
"""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from catversion_jax.data.photos import Photo
from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError, short
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import silence
from catversion_jax.utils.paths import AnyPath, local_copy, upload_folder

# It warns of a dataset that is not there yet; what fails is reported by `read_dataset`.
silence("tensorflow_datasets")

DIGEST_FILE = "digest.json"
Example = dict[str, bytes]
"""A photo as it is stored: name, image with its caption, and mask."""
CAPTION = "Description"
"""The PNG keyword of a caption. As a feature of its own it would make datasets unreadable that were stored before."""


@dataclass(frozen=True)
class DatasetDigest:
    """What DIGEST_FILE holds. Datasets that were stored before there was one lack it."""

    sha256: str


def encode_png(array: np.ndarray | None, caption: str = "") -> bytes:
    """Encodes an image or a mask as PNG bytes; None gives empty bytes."""
    if array is None:
        return b""
    texts = PngInfo()
    if caption:
        texts.add_itxt(CAPTION, caption)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()


def open_png(data: bytes) -> PngImageFile:
    image = PngImageFile(io.BytesIO(data))
    image.load()
    return image


def to_example(photo: Photo) -> Example:
    # As the system has it: a file's name need not be UTF-8.
    image = encode_png(photo.image, photo.caption)
    return {"name": os.fsencode(photo.name), "image": image, "mask": encode_png(photo.mask)}


def to_photo(example: Example) -> Photo:
    image = open_png(example["image"])
    mask = np.asarray(open_png(example["mask"])) if example["mask"] else None
    caption = str(image.text.get(CAPTION, ""))
    return Photo(os.fsdecode(example["name"]), np.asarray(image), mask, caption=caption)


def digest_of_examples(examples: Iterable[Example]) -> DatasetDigest:
    """Hashes the examples, whose order does not matter."""
    parts = sorted(b"".join(hashlib.sha256(example[key]).digest() for key in sorted(example)) for example in examples)
    return DatasetDigest(hashlib.sha256(b"".join(parts)).hexdigest())


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # tfds is untyped
    """One split, `train`, with the features name, image and mask (bytes; empty if there is no mask)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, examples: list[Example] | None = None, **kwargs):
        self._examples = examples or []
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        scalar = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = tfds.features.FeaturesDict({"name": scalar, "image": scalar, "mask": scalar})
        return tfds.core.DatasetInfo(builder=self, features=features, description="Photos of one concept.")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for example in self._examples:
            yield example["name"], example


def write_dataset(folder: AnyPath, photos: list[Photo]) -> None:
    """Writes the dataset, unless a complete one exists."""
    if not isinstance(folder, Path):
        if not folder.exists():
            with tempfile.TemporaryDirectory() as local:
                write_dataset(Path(local), photos)
                upload_folder(Path(local), folder)
        return
    tfds.disable_progress_bar()
    examples = list(map(to_example, photos))
    builder = Photos(examples, data_dir=folder)
    if builder.is_prepared():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # First, so that a dataset that is complete has it.
    text = records.encode(digest_of_examples(examples)) + "\n"
    write_atomically(folder / DIGEST_FILE, lambda path: path.write_text(text))
    config = tfds.download.DownloadConfig(compute_stats="skip", try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads
        builder.download_and_prepare(download_config=config)


def read_dataset(folder: AnyPath) -> list[Photo]:
    """Returns the photos, sorted by name. Raises UserError if there is no complete and undamaged dataset."""
    # ArrayRecord reads files of this machine alone.
    with local_copy(folder) as local:
        return read_local(local)


def read_local(folder: Path) -> list[Photo]:
    try:
        for path in folder.rglob("*"):  # a device or a pipe would never end
            if not (path.is_dir() or path.is_file()):
                raise UserError(f"{path.name}: not a regular file")
        with contextlib.redirect_stdout(io.StringIO()):
            examples = list(Photos(data_dir=folder).as_data_source("train"))
        check_digest(folder / DIGEST_FILE, examples)
        return sorted(map(to_photo, examples), key=lambda photo: photo.name)
    except Exception as error:  # TFDS and ArrayRecord raise types of their own
        raise UserError(
            f"{folder}: not a readable photo dataset ({short(error)}); restore the folder from a copy, or start the "
            "run anew in another run_dir"
        ) from error


def are_equal(ours: Iterable[Photo], theirs: Iterable[Photo]) -> bool:
    """Returns whether two lists hold the same photos with the same masks, in any order."""
    return digest_of_examples(map(to_example, ours)) == digest_of_examples(map(to_example, theirs))


def check_digest(path: Path, examples: list[Example]) -> None:
    """Raises UserError if the digest at `path`, if there is one, is not that of the examples."""
    if path.exists():
        expected = records.read_record(path, DatasetDigest, "expected a digest")
        if digest_of_examples(examples) != expected:
            raise UserError("its digest is not that of its photos; a file was changed or damaged")
