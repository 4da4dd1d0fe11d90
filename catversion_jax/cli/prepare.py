"""`catversion prepare PHOTOS --out=READY`: writes exactly what training will see, and a contact sheet to look at."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from catversion_jax.base.pipeline import resolution_of
from catversion_jax.cli.flags import checked_config, define_config, make_out
from catversion_jax.config import OF_A_RUN
from catversion_jax.config.shipped import config_source
from catversion_jax.data.photo_checks import check_photos
from catversion_jax.data.photos import Photo, describe_count, training_photos
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.image_grid import grid
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, expand
from catversion_jax.utils.types import UInt8

POSITIONALS = ("PHOTOS",)
SHEET = "contact_sheet.png"


def define_flags() -> None:
    define_config(
        config_source("mini"),
        "Config whose model the photos are for: a file or a shipped one; --config.KEY=VALUE overrides a key. "
        "Default: mini.",
    )
    flags.DEFINE_integer(
        "resolution",
        None,
        "Pixels along a side; if not set, those of the config's model, which is then needed.",
        1,
        8192,
    )
    flags.DEFINE_string("out", None, f"Folder for photos/, photos/masks/ and {SHEET}; required.")


def main(arguments: flags.FlagValues, photos: str) -> int:
    """Writes the photos, their masks and captions, and the contact sheet; prints the warnings."""
    config = checked_config(arguments, OF_A_RUN)
    if not arguments.out:
        raise UserError("--out: missing; expected the folder to write")
    resolution = arguments.resolution or resolution_of(config.model)
    found = training_photos(replace(config.data, dir=photos), resolution)
    out = expand(arguments.out)
    if (out / "photos").exists():
        raise UserError(f"{out / 'photos'}: is there already; remove it, or choose another --out")
    write_photos(out / "photos", found)
    warnings = check_photos(found)
    write_atomically(out / SHEET, contact_sheet(found, warnings).save)
    for photo, of_photo in zip(found, warnings, strict=True):
        for warning in of_photo:
            warn(f"{photo.name}: {warning}")
    print(f"photos:   {describe_count(found)}, in {out / 'photos'}\nlook at:  {out / SHEET}")
    return 0


def write_photos(folder: AnyPath, photos: Sequence[Photo]) -> None:
    """Writes each photo and its mask as PNG, and its caption: a folder that trains as the source does, bit for bit."""
    make_out(folder)
    for photo in photos:
        write_atomically(folder / f"{photo.name}.png", Image.fromarray(photo.image).save)
        if photo.mask is not None:
            make_out(folder / "masks")
            write_atomically(folder / "masks" / f"{photo.name}.png", Image.fromarray(photo.mask).save)
        if photo.caption:
            write_atomically(folder / f"{photo.name}.txt", partial(write_caption, caption=photo.caption))


def write_caption(path: Path, caption: str) -> None:
    path.write_text(f"{caption}\n", "utf-8")


def contact_sheet(photos: Sequence[Photo], warnings: Sequence[Sequence[str]]) -> Image.Image:
    """Returns each photo beside what its mask leaves, with its name, its caption and its warnings."""
    labels = [label(photo, of_photo) for photo, of_photo in zip(photos, warnings, strict=True)]
    return grid([[photo.image, *subject(photo)] for photo in photos], labels, ["what training sees", "the subject"])


def label(photo: Photo, warnings: Sequence[str]) -> str:
    caption = [f'"{photo.caption}"'] if photo.caption else []
    return "; ".join([photo.name, *caption, *warnings])


def subject(photo: Photo) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Returns the photo with its background dimmed; nothing for one without a mask."""
    if photo.mask is None:
        return []
    return [np.where(photo.mask[..., None], photo.image, photo.image // 5 + 24).astype(np.uint8)]
