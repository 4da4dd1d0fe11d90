"""Where the concepts and the base models of a folder's pictures are on this machine.

A picture, which may be shared, names its concepts by digests and its model without its folder. This file stays beside
the pictures, as a run's config.json stays beside its concept.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from catversion_jax.methods.concept_file import Concept
from catversion_jax.sampling.picture_record import model_id
from catversion_jax.utils import records
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath, expand, is_remote, whole
from catversion_jax.utils.settings import is_text

FILE_NAME = ".sources.json"


class Sources(msgspec.Struct):
    concepts: dict[str, str] = {}  # paths or names on Hugging Face, by digest
    models: dict[str, str] = {}  # paths, by model_id
    loras: dict[str, str] = {}  # paths, by digest
    starts: dict[str, tuple[str, ...]] = {}  # the file that a picture began as and that of its mask, by digest


def read_sources(folder: AnyPath) -> Sources:
    """Returns what a folder's file says. Raises UserError for a file that is not one."""
    path = folder / FILE_NAME
    if not path.is_file():
        return Sources()
    return records.read_record(path, Sources, "expected what catversion generate wrote; remove it")


def add_sources(
    folder: AnyPath,
    concepts: Mapping[str, Concept],
    model: str,
    starts: Mapping[str, Sequence[str]],
    loras: Mapping[str, str],
) -> None:
    """Adds concepts, given by their sources, a base model, and pictures to start from and LoRAs by their digests."""
    sources = read_sources(folder)
    found = {concept.digest: kept(source) for source, concept in concepts.items()}
    models = {model_id(model): kept(model)} if model_id(model) else {}
    files = {digest: tuple(map(kept, paths)) for digest, paths in starts.items()}

    def may_be_told(path: str) -> bool:
        # A bucket is seen by others, whom the paths of this machine do not concern, and JSON holds text alone.
        return is_text(path) and not (is_remote(folder) and Path(path).is_absolute())

    def told(paths: Mapping[str, str]) -> dict[str, str]:
        return {key: path for key, path in paths.items() if may_be_told(path)}

    added = Sources(
        sources.concepts | told(found),
        sources.models | told(models),
        sources.loras | told({digest: kept(path) for digest, path in loras.items()}),
        sources.starts | {key: paths for key, paths in files.items() if all(map(may_be_told, paths))},
    )
    if added != sources:
        write_atomically(folder / FILE_NAME, lambda path: path.write_text(records.encode(added) + "\n"))


def kept(source: str) -> str:
    """Returns a path that means the same from every folder; a name on Hugging Face as it is."""
    return whole(source) if expand(source).exists() else source
