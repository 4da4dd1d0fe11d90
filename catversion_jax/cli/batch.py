"""`catversion batch`: learn the concepts of a manifest, many at once in one compiled step."""

from absl import flags

from catversion_jax.cli.flags import checked_config, define_config
from catversion_jax.training.distributed import Process, from_environment, meet
from catversion_jax.training.many_concepts import BatchOutcome, Share, train_many
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import expand

FAILED = 2
"""Exit status where a concept failed."""


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("manifest", None, "A file with a JSON object a line: id, dir, class_word; masks, seed, steps.")
    flags.DEFINE_integer("num_processes", None, "How many processes share the manifest. Default: this one alone.", 1)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", 0)
    flags.DEFINE_bool("distributed", False, "Take both from the cluster's environment: SLURM, MPI, SkyPilot or GKE.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0: begin when all processes have started.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for that.", lower_bound=1)


def main(arguments: flags.FlagValues) -> int:
    config = checked_config(arguments, unset=("data.dir", "concept.class_word"))
    if not arguments.manifest:
        raise UserError("--manifest: missing; expected a file with a JSON object a line: id, dir, class_word")
    outcome = train_many(Share.of(config, expand(arguments.manifest), start(arguments)))
    return report(outcome)


def start(arguments: flags.FlagValues) -> Process:
    """Finds out which process this is and, with a coordinator and more than one process, waits for all."""
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
    if address is not None and process.count > 1:
        meet(address, process, arguments.start_timeout)
    return process


def report(outcome: BatchOutcome) -> int:
    """Says what came of a share; returns the exit status: 0, FAILED, or 128 + the number of the signal that interrupted
    it."""
    folder = outcome.report.parent
    if outcome.interrupted_by:
        print(f"{folder}: stopped; the same command continues")
        return 128 + outcome.interrupted_by
    if not outcome.trained:
        print(f"{folder}: all {outcome.concepts} concepts are done already; nothing to do")
        return 0
    done = outcome.concepts - outcome.failed
    print(f"{folder}: {done} concepts done, {outcome.failed} failed; see {outcome.report}")
    return FAILED if outcome.failed else 0
