"""`catversion convert SOURCE TARGET`: converts an adapter of the paper's authors to `concept.safetensors`, or back."""

from absl import flags

from catversion_jax.methods import concept_file, official
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import expand, local_copy, make_folder

POSITIONALS = ("SOURCE", "TARGET")


def define_flags() -> None:
    flags.DEFINE_string(
        "class_word", "", "Base class that the authors' adapter was trained with, which its file does not record."
    )


def main(arguments: flags.FlagValues, source: str, target: str) -> int:
    """Converts a run directory or .safetensors file to an authors' adapter, and any other file to a concept."""
    path, written = expand(source), expand(target)
    is_concept = path.is_dir() or path.suffix == ".safetensors"
    if not is_concept and written.suffix != ".safetensors":
        written = written / concept_file.FILE_NAME
    if written.exists():
        raise UserError(f"{written}: exists already; name another target")
    if is_concept and arguments.class_word:
        raise UserError("--class_word: an authors' adapter cannot hold it; leave it out")
    if is_concept:
        concept = concept_file.load(path)
    else:
        with local_copy(path) as local:
            concept = official.read_adapter(local, arguments.class_word)
    make_folder(written.parent)
    if is_concept:
        official.write_adapter(written, concept, path)
        if concept.strength != 1:
            warn(f"{written}: an authors' adapter cannot hold the strength of {concept.strength:g}; it acts at 1")
    else:
        concept_file.save(written, concept)
    length, layers = len(concept.learned["prefix"]), concept.method.metadata()["layers"]
    print(f"{written}: a prefix of length {length} in layers {', '.join(map(str, layers))}")
    return 0
