"""`catversion batch`: trains the concepts of a manifest, many at once in one compiled step."""

from absl import flags

from catversion_jax.cli.flags import checked_config, define_config, given_config
from catversion_jax.cli.ray_flags import define_ray, given_ray
from catversion_jax.fleet.batch import train_on_ray
from catversion_jax.training.distributed import Process, from_environment, meet
from catversion_jax.training.many_concepts import BatchOutcome, train_many
from catversion_jax.training.share import Share
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import expand

FAILED = 2
"""Exit status if a concept failed."""


def define_flags() -> None:
    define_config()
    flags.DEFINE_string(
        "manifest",
        None,
        "File with a JSON object per line: id, dir, class_word; optionally masks, article, seed, steps; required.",
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Number of processes that share the manifest; if not set, this process trains all of it.",
        1,
    )
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0 to num_processes - 1.", 0)
    flags.DEFINE_bool(
        "distributed", False, "Take num_processes and process_id from the environment of SLURM, MPI, SkyPilot or GKE."
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, at which the processes wait until all have started; if not set, none waits.",
    )
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for all processes to start.", lower_bound=1)
    define_ray()


def main(arguments: flags.FlagValues) -> int:
    given_config(arguments)
    if not arguments.manifest:
        raise UserError("--manifest: missing; expected a file with a JSON object a line: id, dir, class_word")
    process = given_process(arguments)
    config = checked_config(arguments, unset=("data.dir", "concept.class_word"))
    if (options := given_ray(arguments)) is not None:
        if process.count > 1 or arguments.coordinator_address is not None:
            raise UserError("--ray: hands out the concepts by itself; leave num_processes and the like out")
        return report(train_on_ray(Share.of(config, expand(arguments.manifest)), options))
    if arguments.coordinator_address is not None:
        meet(arguments.coordinator_address, process, arguments.start_timeout)
    return report(train_many(Share.of(config, expand(arguments.manifest), process)))


def given_process(arguments: flags.FlagValues) -> Process:
    """Returns which process this is, by the flags or the cluster's environment."""
    count, index, address = arguments.num_processes, arguments.process_id, arguments.coordinator_address
    if (count is None) != (index is None):
        raise UserError("--num_processes and --process_id: expected both or none")
    process = Process(index or 0, count or 1)
    if count is None and arguments.distributed:
        process = from_environment()
    elif count is None and address is not None:
        raise UserError("--coordinator_address: needs --num_processes and --process_id, or --distributed")
    if process.index >= process.count:
        raise UserError(
            f"--process_id={process.index}: expected 0 to {process.count - 1}, of {process.count} processes"
        )
    return process


def report(outcome: BatchOutcome) -> int:
    """Prints the outcome of a share. Returns 0, FAILED, or 128 + the number of the interrupting signal."""
    folder = outcome.folder
    if outcome.interrupted_by:
        print(f"{folder}: stopped; the same command continues")
        return 128 + outcome.interrupted_by
    if not outcome.attempted:
        print(f"{folder}: all {outcome.concepts} concepts are done already; nothing to do")
        return 0
    done = outcome.concepts - outcome.failed
    print(f"{folder}: {done} concepts done, {outcome.failed} failed; see catversion status {folder}")
    return FAILED if outcome.failed else 0
