"""Files of a model in a bucket, in a cache of this machine: copied once, and again where the bucket has others now."""

import fnmatch
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from catversion_jax.utils import cache
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath, download_file, explained_access, inside, of_path
from catversion_jax.utils.records import encode, read_record

STAMPS = ".stamps.json"
"""What the bucket said of each file that was copied."""


def fetch_from_bucket(source: AnyPath, patterns: Sequence[str]) -> Path:
    """Returns the cached folder with the files of a bucket's folder that match `patterns`, each relative to it."""
    url = os.fspath(source)
    target = cache_folder(url)
    with explained_access(source):
        found = of_path(source).find(url, detail=True)
    base = url.split("://", 1)[1].rstrip("/")
    stamps = {os.path.relpath(name, base): stamp_of(facts) for name, facts in found.items()}
    wanted = {name: s for name, s in stamps.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    known = read_stamps(target)
    for name, stamp in wanted.items():
        if known.get(name) != stamp or not (target / name).is_file():
            download_file(source / name, target / inside(source / name, source))
    for name in known.keys() - stamps.keys():  # of a model that was replaced
        (target / name).unlink(missing_ok=True)
    write_stamps(target, {name: s for name, s in (known | wanted).items() if name in stamps})
    return target


def fetch_one(source: AnyPath) -> Path:
    """Returns the cached copy of one file in a bucket."""
    with explained_access(source):
        stamp = stamp_of(of_path(source).info(os.fspath(source)))
    target = cache_folder(os.fspath(source))
    if read_stamps(target) != {source.name: stamp} or not (target / source.name).is_file():
        download_file(source, target / source.name)
        write_stamps(target, {source.name: stamp})
    return target / source.name


def cache_folder(url: str) -> Path:
    """Returns the cache's folder for a URL. Raises UserError if it is not the person's own: weights are trusted."""
    folder = cache.home() / "models"
    if reason := cache.make_private(folder):
        raise UserError(f"{folder}: cannot keep the model of {url}: {reason}; set XDG_CACHE_HOME to a folder of yours")
    return folder / hashlib.sha256(url.encode()).hexdigest()[:16]


def stamp_of(facts: dict) -> str:
    """Returns what tells an object from another that replaced it."""
    return str(facts.get("generation") or facts.get("ETag") or facts.get("etag") or facts.get("size"))


def read_stamps(folder: Path) -> dict[str, str]:
    path = folder / STAMPS
    return read_record(path, dict[str, str], "remove it") if path.is_file() else {}


def write_stamps(folder: Path, stamps: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STAMPS, lambda path: path.write_text(encode(stamps)))
