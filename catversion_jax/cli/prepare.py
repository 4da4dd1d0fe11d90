"""`catversion prepare PHOTOS --out=READY`: writes exactly what training will see, and a contact sheet to look at."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from absl import flags
from PIL import Image

from catversion_jax.base.pipeline import load_pipeline, resolution_of
from catversion_jax.cli.flags import checked_config, define_config, make_out
from catversion_jax.config import OF_A_RUN, Config
from catversion_jax.config.shipped import config_source
from catversion_jax.data.photo_checks import check_photos
from catversion_jax.data.photos import Photo, describe_count, mask_shares, training_photos
from catversion_jax.data.subject_masks import warn_of_masks
from catversion_jax.evaluation.grabcut import check_installed
from catversion_jax.evaluation.photo_masks import subject, with_masks
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.image_grid import grid
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, expand

POSITIONALS = ("PHOTOS",)
SHEET = "contact_sheet.png"
AUTO = "auto"


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
    flags.DEFINE_string(
        "masks",
        None,
        f'Folder of subject masks; or "{AUTO}", which makes them by the model\'s attention to the word of '
        "--config.concept.class_word. If not set, masks that lie with the photos.",
    )
    flags.DEFINE_string("out", None, f"Folder for photos/, photos/masks/ and {SHEET}; required.")


def main(arguments: flags.FlagValues, photos: str) -> int:
    """Writes the photos, their masks and captions, and the contact sheet; prints the warnings."""
    config = checked_config(arguments, OF_A_RUN)
    if not arguments.out:
        raise UserError("--out: missing; expected the folder to write")
    out = expand(arguments.out)
    if (out / "photos").exists():
        raise UserError(f"{out / 'photos'}: is there already; remove it, or choose another --out")
    auto = arguments.masks == AUTO
    if auto:
        check_auto(config, arguments.resolution)
    data = replace(config.data, dir=photos)
    if arguments.masks and not auto:
        data = replace(data, masks_dir=arguments.masks)
    found = training_photos(data, arguments.resolution or resolution_of(config.model))
    if auto:
        if any(photo.mask is not None for photo in found):
            raise UserError(f"--masks={AUTO}: the photos have masks already; leave it out to use them, or remove them")
        found = with_masks(config, load_pipeline(config.model), found)
        warn_of_masks(photos, mask_shares(found))
    write_photos(out / "photos", found)
    warnings = check_photos(found)
    write_atomically(out / SHEET, contact_sheet(found, warnings).save)
    for photo, of_photo in zip(found, warnings, strict=True):
        for warning in of_photo:
            warn(f"{photo.name}: {warning}")
    print(f"photos:   {describe_count(found)}, in {out / 'photos'}\nlook at:  {out / SHEET}")
    return 0


def check_auto(config: Config, resolution: int | None) -> None:
    """Raises UserError if masks cannot be made, before anything is read."""
    check_installed()
    if not config.concept.class_word:
        raise UserError(f"--masks={AUTO}: needs --config.concept.class_word, which says what the subject is")
    if resolution is not None:
        raise UserError(f"--masks={AUTO}: made at the resolution of the model; leave out --resolution")


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
    subjects = map(subject, photos)
    rows = [[photo.image, *([] if alone is None else [alone])] for photo, alone in zip(photos, subjects, strict=True)]
    return grid(rows, labels, ["what training sees", "the subject"][: max(map(len, rows))])


def label(photo: Photo, warnings: Sequence[str]) -> str:
    caption = [f'"{photo.caption}"'] if photo.caption else []
    return "; ".join([photo.name, *caption, *warnings])
