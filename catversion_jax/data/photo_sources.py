"""Where a set of photos comes from: a folder, a zip file, or URLs; brought to a folder of this machine or a bucket."""

import contextlib
import http.client
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

from catversion_jax.data.images import MAX_FILE_BYTES
from catversion_jax.utils.errors import StorageError, UserError, is_storage_error, short
from catversion_jax.utils.files import MIB, read_text
from catversion_jax.utils.paths import AnyPath, calling, expand, local_copy

MOST_FILES = 1000
MOST_BYTES = 4096 * MIB
"""Of all files of a zip file together, unpacked."""
MOST_LIST_BYTES = MIB
MOST_NAME = 255  # bytes, which is what file systems take
TIMEOUT = 60  # seconds without an answer
SECURE = "https://"
WEB = (SECURE, "http://")


@contextlib.contextmanager
def local_source(source: str | AnyPath, contents: bool = True) -> Iterator[AnyPath]:
    """Gives the folder of a source's photos; of a zip file and of URLs it is temporary. Messages name the source.

    Without `contents` the files of a zip file are empty: their names are all that is asked for.
    """
    if is_listed(source):
        with tempfile.TemporaryDirectory() as folder, calling(folder, "URL"):
            for i, url in enumerate(urls_of(source)):
                download_url(url, Path(folder) / file_name(url, i))
            yield Path(folder)
        return
    path = expand(source)
    if path.suffix.lower() != ".zip" or path.is_dir():
        yield path
        return
    with local_copy(path) as packed, tempfile.TemporaryDirectory() as folder, calling(folder, str(path)):
        yield unzip(packed, Path(folder), contents)


def unzip(packed: Path, folder: Path, contents: bool = True) -> Path:
    """Unpacks a zip file within limits; returns the folder with the photos, which may be the only one inside.

    Without `contents` its files are empty.

    Raises UserError for a damaged file, for names that lead elsewhere, and for more than the limits.
    """
    try:
        with zipfile.ZipFile(packed) as archive:
            files = [entry for entry in archive.infolist() if not entry.is_dir()]
            total = sum(entry.file_size for entry in files)
            if len(files) > MOST_FILES or total > MOST_BYTES:
                what = f"{len(files)} files of {total // MIB} MiB"
                raise UserError(f"{packed}: {what}; expected at most {MOST_FILES} of {MOST_BYTES // MIB}")
            for entry in files:
                parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
                if not parts or ".." in parts or parts[0] == "/":
                    raise UserError(f"{packed}: the name {entry.filename!r} leads out of it; expected photos alone")
                if any(len(os.fsencode(part)) > MOST_NAME for part in parts):
                    raise UserError(f"{packed}: the name {entry.filename[:40]!r}... is too long; give it a shorter one")
                if parts[0] == "__MACOSX":  # macOS's notes on the other files
                    continue
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not contents:
                    target.touch()
                    continue
                with archive.open(entry) as inside, target.open("wb") as file:
                    # One file of more than its header says would fill the disk.
                    shutil.copyfileobj(Limited(inside, min(entry.file_size, MAX_FILE_BYTES + 1)), file)
    except UserError:
        raise
    # Not BadZipFile alone: damaged contents raise what each kind of compression raises.
    except Exception as error:
        if is_storage_error(error):
            raise
        raise UserError(
            f"{packed}: not a readable zip file ({short(error)}); pack it again, without a password"
        ) from error
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return found[0] if len(found) == 1 and found[0].is_dir() else folder


class Limited:
    """A file of which at most `left` bytes are read."""

    def __init__(self, file, left: int):
        self._file, self._left = file, left

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def is_listed(source: str | AnyPath) -> bool:
    """Whether a source is URLs, or a text file of them."""
    text = os.fspath(source)
    return text.startswith(WEB) or (text.lower().endswith(".txt") and not expand(text).is_dir())


def urls_of(source: str | AnyPath) -> list[str]:
    """Returns the URLs of a list. Raises UserError for anything that does not begin with https://."""
    text = os.fspath(source)
    if not text.startswith(WEB):
        text = read_text(expand(text), MOST_LIST_BYTES, "expected a text file with one https:// URL a line")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    urls = re.split(r"[\s,]+", "\n".join(lines).strip())
    if bad := [url for url in urls if not url.startswith(SECURE) or not names_server(url)]:
        raise UserError(f"{bad[0]}: no https:// URL; expected one of a photo")
    return urls


def names_server(url: str) -> bool:
    """Whether a URL names a server, and a port if it has one."""
    try:
        parts = urlparse(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def file_name(url: str, index: int) -> str:
    """Returns the name of a downloaded file: its place in the list, and the end of its URL's path."""
    last = PurePosixPath(unquote(urlparse(url).path)).name
    return f"{index:03}-{re.sub(r'[^A-Za-z0-9._-]', '_', last)[-80:]}"


class OnlySecure(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https:// alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(SECURE):
            raise UserError(f"{req.full_url}: leads to {newurl}, which is no https:// URL; give the photo's own")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download_url(url: str, target: Path) -> None:
    """Downloads a photo. Raises UserError if there is none, and StorageError if the server is out of reach."""
    opener = urllib.request.build_opener(OnlySecure)
    try:
        with opener.open(url, timeout=TIMEOUT) as answer, target.open("wb") as file:
            shutil.copyfileobj(Limited(answer, MAX_FILE_BYTES + 1), file)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} {error.reason}; correct the URL") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise StorageError(f"{url}: not downloaded ({short(error)}); run the command again") from error
