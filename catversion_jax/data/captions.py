"""Captions: text files beside photos, each of which takes the place of the templates for its photo."""

from collections.abc import Iterable, Sequence

from catversion_jax.data.photo_folder import names_of, stem_of
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import read_text
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.settings import is_plain

MOST_BYTES = 1 << 16
EXPECTED = "expected a caption of one line, as text"


def captions_of(photos: Sequence[AnyPath], captions: Iterable[AnyPath]) -> dict[AnyPath, AnyPath]:
    """Returns the caption of each photo that has one: of its stem, or of its whole name (x.txt, x.jpg.txt).

    The same name in another case counts if no photo has it as it is. Raises UserError if a photo has two.
    """
    exact = {name: photo for photo in photos for name in names_of(photo)}
    in_any_case = {name.casefold(): photo for name, photo in exact.items()}
    found: dict[AnyPath, AnyPath] = {}
    for path in captions:
        name = stem_of(path)
        photo = exact.get(name) or in_any_case[name.casefold()]
        if photo in found:
            raise UserError(f"{found[photo]}, {path}: two captions of one photo; expected one; remove the other")
        found[photo] = path
    return found


def read_caption(path: AnyPath) -> str:
    """Returns the first line that is not blank, with its fields unfilled; "" and a warning for a file without any.

    Warns of further lines. Raises UserError, naming the file, for one that is no text or too large.
    """
    lines = [" ".join(line.split()) for line in read_text(path, MOST_BYTES, EXPECTED).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        warn(f"{path}: an empty caption; its photo has the templates' prompts")
        return ""
    if len(lines) > 1:
        warn(f"{path}: {len(lines)} lines; the first one is the caption")
    if not is_plain(lines[0]):
        raise UserError(f"{path}: holds control characters; {EXPECTED}")
    return lines[0]
