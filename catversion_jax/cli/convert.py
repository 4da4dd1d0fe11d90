"""`catversion convert SOURCE TARGET`: an adapter of the paper's authors to our `concept.safetensors`, or back."""

from absl import flags

from catversion_jax.methods import concept_file, official
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import expand

POSITIONALS = ("SOURCE", "TARGET")


def define_flags() -> None:
    flags.DEFINE_string("class_word", "", "The base class an authors' adapter was learned with; the file does not say.")


def main(arguments: flags.FlagValues, source: str, target: str) -> int:
    """A run directory or a .safetensors file is a concept and becomes an authors' adapter; any other file is one."""
    source, target = expand(source), expand(target)
    is_concept = source.is_dir() or source.suffix == ".safetensors"
    if not is_concept and target.suffix != ".safetensors":
        target = target / concept_file.FILE_NAME
    if target.exists():
        raise UserError(f"{target}: exists already; name another target")
    if is_concept and arguments.class_word:
        raise UserError("--class_word: an authors' adapter cannot hold it; leave it out")
    concept = concept_file.load(source) if is_concept else official.read(source, arguments.class_word)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_concept:
        official.write(target, concept, source)
    else:
        concept_file.save(target, concept)
    length, (layers,) = len(concept.learned["prefix"]), concept.method.layers
    print(f"{target}: a prefix of length {length} in layers {', '.join(map(str, layers))}")
    return 0
