"""What a folder of photos holds: photos, masks and captions that lie beside them, and files that are none of these."""

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from catversion_jax.utils.errors import UserError, refused
from catversion_jax.utils.paths import AnyPath, entries

IGNORED = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "zbthumbnail.info")
"""Left in folders by file managers; names that begin with a dot are ignored too."""

PHOTO_ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"))
OTHER_ENDINGS = frozenset(
    (
        ".txt", ".caption", ".cap", ".tags", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".md",
        ".xml", ".xmp", ".aae", ".thm", ".lrv", ".pp3", ".dop", ".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm",
        ".3gp", ".mp3", ".wav", ".m4a", ".npy", ".npz", ".pt", ".safetensors", ".html", ".url", ".log", ".ini",
        ".pdf", ".zip", ".py",
    )
)  # fmt: skip
"""Endings of settings, films and other files that are never photos."""
CAPTION_ENDINGS = (".txt", ".caption")

MASK_NAME = re.compile(
    r"(?P<photo>.+?)(\.(png|jpe?g|webp))?[-_. (]+(?P<what>masklabel|condlabel|masks?|matte|alpha|seg)\)?[-_]?\d*"
    r"|masks?[-_. ](?P<after>.+)",
    re.IGNORECASE | re.DOTALL,
)
"""Stem of a mask that lies beside its photo; OneTrainer writes PHOTO-masklabel.png and PHOTO-condlabel.png."""
LABELS = ("masklabel", "condlabel")
"""Endings of names that are never a photo's."""


class FolderFiles(NamedTuple):
    """The files of a folder of photos, each sorted by name."""

    photos: list[AnyPath]
    masks: list[AnyPath]  # beside their photos
    captions: list[AnyPath]  # beside their photos, named as they are
    others: list[AnyPath]


def stem_of(path: AnyPath) -> str:
    """Returns a file's stem, by which photos and masks meet: composed (NFC), with bytes that are no UTF-8 escaped.

    File systems keep accents as one character or as two, and a disk may have been written on the other kind.
    """
    return unicodedata.normalize("NFC", os.fsencode(path.stem).decode(errors="backslashreplace"))


def names_of(photo: AnyPath) -> tuple[str, str]:
    """Returns what a file that belongs to a photo may be named like: the photo's stem, or its whole name."""
    stem = stem_of(photo)
    return stem, stem + photo.suffix


def is_hidden(path: AnyPath) -> bool:
    # The last is what Windows notes beside a downloaded file, and WSL copies.
    name = path.name.lower()
    return name.startswith(".") or name in IGNORED or name.endswith(":zone.identifier")


def list_files(folder: AnyPath) -> list[AnyPath]:
    """Returns the regular files of a folder, sorted by name. Sub-folders and hidden files are left out.

    Raises UserError for a folder that cannot be listed, for a link to nothing, and for a device or a pipe.
    """
    with refused(f"{folder}: cannot be listed", "expected a folder that you may read"):
        found = entries(folder)
    return [path for path, is_folder in found if not is_folder and not is_hidden(path) and is_regular(path)]


def is_regular(path: AnyPath) -> bool:
    """Whether a path is a regular file; False for a folder. Raises UserError for anything else."""
    if not isinstance(path, Path):
        return True  # a bucket has nothing else
    with refused(f"{path}: cannot be read", "if it is a link, restore what it names, or remove the link"):
        mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: not a regular file; expected photos; remove it")
    return stat.S_ISREG(mode)


def split_folder(folder: AnyPath, keep: Callable[[AnyPath], bool] = lambda _: True) -> FolderFiles:
    """Sorts the files of a folder for which `keep` holds. Raises UserError as `list_files`.

    A file with another ending than a photo's is none if it belongs to a photo, of whose name or stem it is, or if its
    ending tells that it never is one. All others count as photos, and are refused when they are read if they are not.
    """
    files = list(filter(keep, list_files(folder)))
    sure = [path for path in files if path.suffix.lower() in PHOTO_ENDINGS]
    stems = {stem_of(path) for path in sure}
    masks = {path for path in sure if is_mask(path, stems)}
    names = {name.casefold() for path in sure if path not in masks for name in names_of(path)}
    others = {path for path in set(files) - set(sure) if is_other(path, names)}
    left_out = masks | others
    photos = [path for path in files if path not in left_out]
    photo_names = {name.casefold() for path in photos for name in names_of(path)}
    captions = {
        path for path in others if path.suffix.lower() in CAPTION_ENDINGS and stem_of(path).casefold() in photo_names
    }
    return FolderFiles(photos, sorted(masks), sorted(captions), sorted(others - captions))


def is_other(path: AnyPath, names: Collection[str]) -> bool:
    """Whether a file without a photo's ending is no photo; `names` are those of photos, with and without endings."""
    return path.suffix.lower() in OTHER_ENDINGS or stem_of(path).casefold() in names


def is_mask(path: AnyPath, stems: Collection[str]) -> bool:
    """Whether a file beside photos is a mask by its name; PHOTO-mask and the like only if that photo is there."""
    match = MASK_NAME.fullmatch(stem_of(path))
    if match is None:
        return False
    is_label = (match["what"] or "").lower() in LABELS
    return is_label or (match["photo"] or match["after"]).casefold() in {stem.casefold() for stem in stems}


def photo_of_mask(path: AnyPath, photos: Collection[str]) -> str | None:
    """Returns the stem of a mask's photo: its own or, without -masklabel or -mask, the rest; None if none has it.

    The same in another case counts if no photo has it as it is; so does a photo's whole name ("a.png" of a.png.png).
    """
    stem = stem_of(path)
    match = MASK_NAME.fullmatch(stem)
    candidates = [stem, (match["photo"] or match["after"]) if match else stem]
    if Path(stem).suffix.lower() in PHOTO_ENDINGS:
        candidates.append(Path(stem).stem)
    by_case = {photo.casefold(): photo for photo in photos}
    exact = next((name for name in candidates if name in photos), None)
    return exact or next((by_case[name.casefold()] for name in candidates if name.casefold() in by_case), None)
