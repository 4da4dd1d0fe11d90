"""status.json of a concept, beside its concept.safetensors: whether it is done, and how it went."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from catversion_jax.utils import records
from catversion_jax.utils.errors import ReportedError
from catversion_jax.utils.files import refuse_link, write_atomically
from catversion_jax.utils.paths import AnyPath, make_folder

FILE_NAME = "status.json"
DONE, FAILED = "done", "failed"
AT_ONCE = 32
"""Files that are read side by side: each takes a bucket some ten milliseconds."""


class ConceptStatus(msgspec.Struct, omit_defaults=True):
    """What became of a concept."""

    id: str
    status: str  # DONE or FAILED
    error: str | None = None
    photos: int | None = None
    steps: int | None = None
    loss: float | None = None  # of the last step
    seconds: float | None = None
    digest: str | None = None  # of the line that it was learned with, in a batch
    node: str | None = None  # which learned it, of a Ray cluster
    waited: float | None = None  # seconds until its first step there


def write_status(folder: AnyPath, status: ConceptStatus) -> None:
    """Writes the status of the concept in `folder`, in place of an earlier one."""
    make_folder(folder)
    if isinstance(folder, Path):  # where somebody else may have put a link, in a shared folder
        refuse_link(folder / FILE_NAME)
    text = records.encode(status) + "\n"
    write_atomically(folder / FILE_NAME, lambda path: path.write_text(text))


def remove_status(folder: AnyPath) -> None:
    (folder / FILE_NAME).unlink(missing_ok=True)


def read_statuses(paths: Iterable[AnyPath]) -> Iterator[ConceptStatus]:
    """Yields what each file says, in the order of the paths. One that is damaged counts as one that failed."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(read_status, paths)


def read_status(path: AnyPath) -> ConceptStatus:
    try:
        return records.read_record(path, ConceptStatus, "expected a concept's status")
    except ReportedError as error:
        return ConceptStatus(path.parent.name, FAILED, str(error))


def status_files(folder: AnyPath) -> list[AnyPath]:
    """Returns the files of a batch's folder, or the one of a single run, sorted."""
    own = folder / FILE_NAME
    return [own] if own.is_file() else sorted(folder.glob(f"*/{FILE_NAME}"))
