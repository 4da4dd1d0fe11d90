"""Photos that are uploaded: a request's files become a folder that `catversion train` would take.

No name of a client becomes the name of a file: photos are numbered, and have the ending of what they are.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fastapi import UploadFile

from catversion_jax.data.images import kind_of_photo
from catversion_jax.data.photo_sources import unzip
from catversion_jax.data.photos import FolderRules, find_photos
from catversion_jax.service.limits import Limits
from catversion_jax.service.requests import PhotosForm
from catversion_jax.service.store import sync_folder
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import calling

ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "HEIF": ".heic", "AVIF": ".avif"}
CHUNK = 2**20
EXPECTED = "expected photos as `images` (repeated), as one `zip`, or as `urls`"


def receive_photos(folder: Path, form: PhotosForm, limits: Limits) -> str:
    """Writes a request's photos, masks and captions to `folder/photos`; returns a digest of all of them.

    Raises UserError for anything that is no photo, and for more than the limits. The files are on the disk when it
    returns.
    """
    photos = folder / "photos"
    photos.mkdir()
    if form.images and form.zip is not None:
        raise UserError(f"images and zip: both were given; {EXPECTED}")
    with calling(f"{folder}/", ""):
        if form.zip is not None:
            if form.masks or form.captions:
                raise UserError("zip: masks and captions are inside it; leave `masks` and `captions` out")
            receive_zip(folder, form.zip, limits)
        else:
            receive_images(photos, form, limits)
    digest = digest_of_files(photos)
    for received in (*(path for path in photos.iterdir() if path.is_dir()), photos, folder):
        sync_folder(received)
    return digest


def receive_images(photos: Path, form: PhotosForm, limits: Limits) -> None:
    check_count(len(form.images), limits)
    for name, given in (("masks", form.masks), ("captions", form.captions)):
        if given and len(given) != len(form.images):
            raise UserError(f"{name}: {len(given)} for {len(form.images)} images; expected one for each, in order")
    for i, upload in enumerate(form.images):
        save_upload(upload, photos / f"{i:03}")
        take_photo(photos / f"{i:03}", limits)
    if form.masks:
        (photos / "masks").mkdir()
    for i, upload in enumerate(form.masks):
        save_upload(upload, photos / "masks" / f"{i:03}")
        take_photo(photos / "masks" / f"{i:03}", limits)
    for i, caption in enumerate(form.captions):
        if caption.strip():
            (photos / f"{i:03}.txt").write_text(caption, "utf-8")


def receive_zip(folder: Path, upload: UploadFile, limits: Limits) -> None:
    """Unpacks a zip file, and takes its photos, with their masks and captions, into `folder/photos`."""
    packed, unpacked, photos = folder / "zip", folder / "unpacked", folder / "photos"
    save_upload(upload, packed)
    unpacked.mkdir()
    inside = unzip(packed, unpacked)
    rules = FolderRules(keys=("zip", "zip"), most=limits.photos)
    with calling(f"{unpacked}/", ""):
        found = find_photos(inside, rules=rules)
        for i, file in enumerate(found):
            shutil.move(file.path, photos / f"{i:03}")
            take_photo(photos / f"{i:03}", limits)
            if file.mask is not None:
                (photos / "masks").mkdir(exist_ok=True)
                shutil.move(file.mask, photos / "masks" / f"{i:03}")
                take_photo(photos / "masks" / f"{i:03}", limits)
            if file.caption is not None:
                shutil.move(file.caption, photos / f"{i:03}.txt")
    packed.unlink()
    shutil.rmtree(unpacked)


def check_count(count: int, limits: Limits) -> None:
    """Raises UserError for more photos than the slots have room for."""
    if count > limits.photos:
        raise UserError(
            f"{count} photos; expected at most {limits.photos}, which is what a slot of this service has room for; "
            "choose the best of them"
        )


def save_upload(upload: UploadFile, path: Path) -> None:
    """Writes an uploaded file, which may be larger than memory."""
    upload.file.seek(0)
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file, CHUNK)


def take_photo(path: Path, limits: Limits) -> Path:
    """Gives a photo the ending of what it is. Raises UserError for one that is none, or too large."""
    kind, pixels = kind_of_photo(path)
    if pixels > limits.megapixels * 10**6:
        raise UserError(
            f"{path}: {pixels / 10**6:.0f} megapixels; expected at most {limits.megapixels}; make it smaller"
        )
    return path.rename(path.with_name(path.name + ENDINGS[kind]))


def files_of(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digest_of_files(folder: Path) -> str:
    """Returns a hash of a folder's files and their names, all of which are flushed to the disk."""
    whole = hashlib.sha256()
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            whole.update(f"{path.relative_to(folder)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return whole.hexdigest()
