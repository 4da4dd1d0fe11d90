"""`catversion status OUT`: lists what became of the concepts of a batch, from its folder here or in a bucket."""

from absl import flags

from catversion_jax.training.status import FAILED, ConceptStatus, read_statuses, status_files
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.markdown import table
from catversion_jax.utils.paths import expand
from catversion_jax.utils.records import encode

POSITIONALS = ("OUT",)
COLUMNS = ("id", "status", "photos", "steps", "loss", "seconds", "waited", "node", "error")
ALWAYS = ("id", "status", "photos", "steps", "loss", "seconds", "error")
"""Those of them that are shown also where no concept has a value: the others are a Ray cluster's."""


def define_flags() -> None:
    flags.DEFINE_bool("failed", False, "List those alone that failed.")
    flags.DEFINE_bool("json", False, "Print a JSON object a line instead of a table.")


def main(arguments: flags.FlagValues, out: str) -> int:
    folder = expand(out)
    found = list(read_statuses(status_files(folder)))
    if not found:
        raise UserError(f"{folder}: no concept is done or failed; expected the run_dir of catversion batch or train")
    shown = [status for status in found if status.status == FAILED or not arguments.failed]
    if arguments.json:
        print(*map(encode, shown), sep="\n")
        return 0
    columns = [name for name in COLUMNS if name in ALWAYS or any(getattr(status, name) is not None for status in shown)]
    print(table(columns, (row(status, columns) for status in shown)))
    failed = sum(status.status == FAILED for status in found)
    print(f"\n{len(found) - failed} concepts done, {failed} failed")
    return 0


def row(status: ConceptStatus, columns: list[str]) -> tuple[str, ...]:
    values = {name: getattr(status, name) for name in columns}
    if status.loss is not None:
        values["loss"] = f"{status.loss:.4f}"
    return tuple("" if value is None else str(value) for value in values.values())
