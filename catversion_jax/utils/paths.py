"""Paths: of this machine, or in a bucket (gs://, s3://), which `etils.epath` gives the methods of pathlib.

`expand` makes every path that a person gives. What pathlib and epath do not share is here and in files.py.
"""

import contextlib
import importlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

# Before the import: with TensorFlow installed, epath would take its file systems, which have other credentials.
os.environ.setdefault("EPATH_USE_TF", "false")

from etils import epath
from etils.epath.gpath import PosixGPath

from catversion_jax.utils.errors import ReportedError, StorageError, UserError, short

if TYPE_CHECKING:
    AnyPath: TypeAlias = Path  # etils has no types; the methods are pathlib's
else:
    AnyPath = Path | epath.Path
"""A path of this machine, or one in a bucket."""

SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
LOST_SLASH = re.compile(r"(gs|s3|file):/(?=[^/])")
"""What pathlib makes of a URL."""


class Service(NamedTuple):
    """A kind of bucket: the extra of setup.py, its module, and how a person gets access."""

    extra: str
    module: str
    grant: str


SERVICES = {
    "gs": Service("gcs", "gcsfs", "run `gcloud auth application-default login`, or ask for access to the bucket"),
    "s3": Service("s3", "s3fs", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ask for access to the bucket"),
}
"""The schemes of URLs that paths may have."""

DENIED = re.compile(r"\b(401|403)\b|AccessDenied|Forbidden|Unable to locate credentials|InvalidAccessKeyId|not have ")
"""The services' words for a lack of access."""


class NoAccess(UserError):
    """A bucket that may not be read or written; it says nothing of what is there."""


class BucketPath(PosixGPath):
    """A path in a bucket. What cannot be asked raises UserError or StorageError; fsspec says that it is not there."""

    def _facts(self) -> dict[str, Any] | None:
        with explained_access(self):
            try:
                return of_path(self).info(os.fspath(self))
            except FileNotFoundError:
                return None

    def exists(self) -> bool:
        return self._facts() is not None

    def is_dir(self) -> bool:
        return (self._facts() or {}).get("type") == "directory"

    def is_file(self) -> bool:
        return (self._facts() or {}).get("type") == "file"

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        with explained_access(self):
            names = of_path(self).glob(f"{os.fspath(self)}/{pattern}")
        yield from (BucketPath(f"{scheme_of(self)}://{name}") for name in sorted(names))

    def read_bytes(self) -> bytes:
        with explained_access(self):
            return of_path(self).cat_file(os.fspath(self))

    def write_bytes(self, data: bytes) -> None:
        with explained_access(self):
            of_path(self).pipe_file(os.fspath(self), data)

    def copy(self, dst: "BucketPath", overwrite: bool = True) -> "BucketPath":
        with explained_access(self):
            of_path(self).copy(os.fspath(self), os.fspath(dst))
        return dst

    def unlink(self, missing_ok: bool = False) -> None:
        with explained_access(self):
            try:
                of_path(self).rm_file(os.fspath(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise


def expand(path: str | AnyPath) -> AnyPath:
    """Returns the path that a person means: a URL's in its bucket, else one of this machine, with a leading ~ expanded.

    A shell leaves a ~ alone inside --flag=~/folder. Raises UserError for a scheme that nobody serves, for a bucket that
    cannot be reached, and for a text that no file system takes as a path.
    """
    text = LOST_SLASH.sub(r"\1://", os.fspath(path), count=1) if LOST_SLASH.match(os.fspath(path)) else os.fspath(path)
    if match := SCHEME.match(text):
        return of_url(text, match["scheme"].lower(), match["rest"])
    try:
        expanded = Path(text).expanduser()
        os.fsencode(expanded)
    except RuntimeError as error:  # ~ of an unknown user, or of a user without a home
        raise UserError(f"{path}: {str(error).rstrip('.')}; write the folder out") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: not a path, as it holds half of a character; write it in UTF-8") from None
    if "\0" in str(expanded):
        raise UserError(f"{path}: not a path, as it holds a NUL; remove that")
    return expanded


def of_url(text: str, scheme: str, rest: str) -> AnyPath:
    """Returns the path of a URL; of file:// that on this machine."""
    if scheme == "file":
        return expand(f"/{rest.lstrip('/')}")
    if scheme not in SERVICES:
        expected = ", ".join(f"{name}://" for name in SERVICES)
        raise UserError(f"{text}: {scheme}:// is no kind of path; expected {expected} or a path of this machine")
    bucket = rest.split("/", 1)[0]
    if not bucket or not rest.isprintable():
        raise UserError(f"{text}: names no bucket; expected {scheme}://BUCKET/FOLDER")
    reach(scheme, bucket)
    return BucketPath(f"{scheme}://{rest}")


def is_remote(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, Path)


def whole(path: str | os.PathLike) -> str:
    """Returns a path that means the same from every folder; a URL as it is."""
    text = os.fspath(path)
    if text.startswith("https://"):
        return text
    expanded = expand(text)
    return os.fspath(expanded if is_remote(expanded) else expanded.absolute())


def named_in(folder: AnyPath, path: str) -> AnyPath:
    """Returns a path that a file in `folder` names: relative to it, unless it is absolute or a URL."""
    # Not `folder / expand(path)`: a path of this machine would take a URL's for one of its own.
    expanded = expand(path)
    return expanded if is_remote(expanded) or expanded.is_absolute() else folder / os.fspath(expanded)


@cache
def file_system(scheme: str) -> Any:
    """Returns the fsspec file system of a scheme. Raises UserError if its package is not installed."""
    service = SERVICES[scheme]
    # Read when gcsfs is imported, which would otherwise ask a second service what kind of bucket each one is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        importlib.import_module(service.module)
    except ImportError as error:
        raise UserError(
            f"{scheme}://: needs {service.module} ({short(error)}); pip install 'catversion-jax[{service.extra}]'"
        ) from error
    import fsspec

    # It logs tracebacks of errors that we report ourselves.
    logging.getLogger(service.module).setLevel(logging.CRITICAL)
    # Listings are not kept: other hosts write to the same folder.
    for name in ("gcs", "gs", "s3"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs" if scheme == "gs" else scheme, use_listings_cache=False)


def of_path(path: AnyPath) -> Any:
    """Returns the fsspec file system of a path in a bucket."""
    return file_system(scheme_of(path))


def scheme_of(path: AnyPath) -> str:
    return os.fspath(path).split("://")[0]


@cache
def reach(scheme: str, bucket: str) -> None:
    """Raises UserError unless a bucket is there and may be read. Asks once for each bucket."""
    url = f"{scheme}://{bucket}"
    with explained_access(url):
        try:
            file_system(scheme).info(bucket)
        except FileNotFoundError:
            raise UserError(f"{url}: no such bucket; make it, or correct its name") from None


@contextlib.contextmanager
def explained_access(path: AnyPath | str) -> Iterator[None]:
    """Turns what a bucket's client raises into UserError, for a lack of access, or StorageError; OSErrors of this
    machine pass."""
    try:
        yield
    except (ReportedError, FileNotFoundError):
        raise
    except Exception as error:  # each client has types of its own
        match = SCHEME.match(os.fspath(path))
        if match is None:
            raise
        if DENIED.search(str(error)) or isinstance(error, PermissionError):
            raise NoAccess(f"{path}: no access ({short(error)}); {SERVICES[match['scheme']].grant}") from error
        raise StorageError(f"{path}: not reached ({short(error)}); run the command again, it goes on") from error


def is_same(one: AnyPath, other: AnyPath) -> bool:
    """Whether two paths name one file or folder, which is there."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.samefile(other)
    return os.fspath(one) == os.fspath(other)


def size_of(path: AnyPath) -> int:
    """Returns the bytes of a file."""
    if isinstance(path, Path):
        return path.stat().st_size
    with explained_access(path):
        return int(of_path(path).info(os.fspath(path))["size"])


def entries(folder: AnyPath) -> list[tuple[AnyPath, bool]]:
    """Returns what a folder holds, sorted by name, each with whether it is a folder itself."""
    if isinstance(folder, Path):
        return [(path, path.is_dir()) for path in sorted(folder.iterdir())]
    with explained_access(folder):
        found = of_path(folder).ls(os.fspath(folder), detail=True)
    # An object that ends in a slash is what consoles make for an empty folder.
    named = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] == "directory" for entry in found}
    return [(folder / name, is_folder) for name, is_folder in sorted(named.items()) if name != folder.name or is_folder]


def make_folder(path: AnyPath) -> None:
    """Makes a folder and those above it; in a bucket there are none to make."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: AnyPath) -> None:
    """Removes a folder and all in it, if it is there; a symbolic link stays."""
    if isinstance(path, Path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    elif path.exists():
        with explained_access(path):
            of_path(path).rm(os.fspath(path), recursive=True)


def files_below(folder: AnyPath) -> list[AnyPath]:
    """Returns all files below a folder, sorted."""
    if isinstance(folder, Path):
        return sorted(path for path in folder.rglob("*") if not path.is_dir())
    with explained_access(folder):
        names = of_path(folder).find(os.fspath(folder))
    return [BucketPath(f"{scheme_of(folder)}://{name}") for name in sorted(names)]


def download(source: AnyPath, target: Path) -> Path:
    """Copies a file, or a folder with all in it, from a bucket to this machine; returns `target`."""
    if source.is_dir():
        for path in files_below(source):
            download_file(path, target / inside(path, source))
    else:
        download_file(source, target)
    return target


def inside(path: AnyPath, folder: AnyPath) -> str:
    """Returns a path relative to a folder. Raises UserError if it leads out of it: a key may have any name."""
    name = os.fspath(path).removeprefix(f"{os.fspath(folder).rstrip('/')}/")
    if ".." in name.split("/") or name.startswith("/"):
        raise UserError(f"{os.fspath(path)}: its name leads out of {folder}; remove that object")
    return name


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Gives a path of this machine with the same file or folder: the path itself or, of a bucket, a temporary copy.

    Messages of errors name what was copied.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with calling(str(copy), str(path)):
            yield download(path, copy)


@contextlib.contextmanager
def calling(temporary: str, source: str) -> Iterator[None]:
    """Puts the name of what was copied in place of a temporary path in messages."""
    try:
        yield
    except ReportedError as error:
        raise type(error)(str(error).replace(temporary, source)) from error


def download_file(source: AnyPath, target: Path) -> None:
    """Copies one object. A crash leaves the whole file, or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        with explained_access(source):
            of_path(source).get_file(os.fspath(source), os.fspath(part))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def upload(source: Path, target: AnyPath) -> None:
    """Copies a file of this machine to a bucket, as one object: it arrives whole, or not at all."""
    with explained_access(target):
        of_path(target).put_file(os.fspath(source), os.fspath(target))


def upload_folder(source: Path, target: AnyPath) -> None:
    """Copies a folder of this machine, with all in it, to a bucket."""
    for path in files_below(source):
        upload(path, target / os.path.relpath(path, source))


def create(path: AnyPath, data: bytes) -> bool:
    """Makes a small file unless it is there already; returns whether it did. Of several who try, one succeeds."""
    if isinstance(path, Path):
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True
    with explained_access(path):
        try:
            of_path(path).pipe_file(os.fspath(path), data, mode="create")
        except FileExistsError:
            return False
        return True
