"""The `catversion` command: finds the sub-command, parses its flags, and turns mistakes into one line."""

import difflib
import importlib
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import absl.logging
from absl import flags
from tqdm import tqdm

from catversion_jax import __version__
from catversion_jax.utils.errors import StorageError, UserError, is_storage_error, short
from catversion_jax.utils.log import LOGGER

# Before anything imports them: JAX's C++ log and transformers' advice are not for our users.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

COMMANDS = {
    "train": "learn a concept from a folder of photos",
    "generate": "sample images with a learned concept",
    "batch": "learn many concepts at once, from a manifest",
    "evaluate": "score images of a concept, sampled here or before; benchmarks",
    "bench": "time the training step, for many sizes, and against PyTorch",
    "study": "the paper's tables: CatVersion against its baselines, and its ablation",
    "sweep": "train and score settings on a folder of concepts with held-out photos",
    "convert": "an adapter of the paper's authors to a concept, or back",
    "export": "a learned concept for PyTorch pipelines and ComfyUI",
    "doctor": "devices, versions, memory, cache: what is there and what is missing",
}
"""Sub-command, which is a module of this room, and what it does. The module has define_flags() and
main(flags, *positionals); if the command takes positionals, POSITIONALS names them."""

MISTAKE, STORAGE, INTERRUPTED = 1, 74, 130
"""Exit statuses besides a command's own: the user's mistake; storage that failed (EX_IOERR of sysexits.h), for which
the same command may work later; Ctrl-C."""

HELP = {"--help", "-h", "-help"}


def usage() -> str:
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"catversion {__version__}: usage: catversion COMMAND [--FLAG=VALUE ...]",
            "",
            *lines,
            "",
            "catversion COMMAND --help lists the command's flags.",
        ]
    )


def nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""


def positionals(module: ModuleType) -> tuple[str, ...]:
    """What the command takes besides flags."""
    return getattr(module, "POSITIONALS", ())


def command_help(name: str, module: ModuleType) -> str:
    """The command's flags and, if it takes a config, the config's keys."""
    defined = flags.FLAGS.get_key_flags_for_module(module)
    usage = " ".join(["catversion", name, *positionals(module), "[--FLAG=VALUE ...]"])
    parts = [f"{usage}: {COMMANDS[name]}", "", *map(flag_help, defined)]
    parts.append(entry("--debug", "Show where an error comes from.", ""))
    if any(flag.name == "config" for flag in defined):
        parts += [
            "",
            "Keys of the config, each --config.KEY=VALUE, with their defaults (a file in configs/ has its own):",
        ]
        parts += ["", *config_help()]
    return "\n".join(parts)


def flag_help(flag: flags.Flag) -> str:
    """An entry of the help; an alias is shown with what it stands for."""
    if isinstance(flag, flags.Flag) and flag.name != "config":
        value = flag.default
    else:
        value = os.path.relpath(flag.default) if flag.default else None
    stands_for = f"--{flag.name}"
    default = "" if value in (None, "", []) else f" Default: {listed(value)}."
    return entry(stands_for, str(flag.help), default)


def listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def entry(name: str, help: str, default: str) -> str:
    return textwrap.fill(f"{name}  {help}{default}", 118, initial_indent="  ", subsequent_indent="      ")


def config_help() -> list[str]:
    """A line for each key: its name, what it is for, and its default."""
    from catversion_jax.config import Config
    from catversion_jax.utils.settings import flatten

    return [entry(key, field.metadata["help"], f" Default: {value!r}.") for key, field, value in flatten(Config())]


def parse(name: str, arguments: list[str], expected: tuple[str, ...] = ()) -> tuple[flags.FlagValues, list[str]]:
    """The command's flags and its `expected` positionals. Raises UserError for what is not one of them."""
    flags.FLAGS.set_gnu_getopt()  # flags may follow positionals
    # config_flags finds --config.KEY overrides in sys.argv, and nowhere else.
    sys.argv = [f"catversion {name}", *arguments]
    for argument in arguments:
        if argument.startswith("--config=") and not Path(argument.removeprefix("--config=").split(":")[0]).is_file():
            raise UserError(f"{argument.removeprefix('--config=')}: no such config file; those shipped are in configs/")
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except flags.Error as error:
        lines = str(error).strip().splitlines()  # a config file's error has its traceback in between
        raise UserError(" ".join(dict.fromkeys([lines[0], lines[-1]]))) from error
    except (AttributeError, KeyError) as error:
        raise UserError(unknown_key(arguments) or str(error)) from error
    if rest and not expected:
        raise UserError(f"{rest[0]}: expected only flags; they begin with --")
    if len(rest) != len(expected):
        raise UserError(f"{name}: {len(rest)} arguments; expected {len(expected)}: {' '.join(expected)}")
    return flags.FLAGS, rest


def unknown_key(arguments: list[str]) -> str | None:
    """What to say of the first --config.KEY that the config does not have."""
    from catversion_jax.config import Config
    from catversion_jax.utils.settings import flatten

    keys = [key for key, _, _ in flatten(Config())]
    for argument in arguments:
        key = argument.split("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and key not in keys:
            return f"config.{key}: no such key{nearest(key, keys)}"
    return None


class Console(logging.Handler):
    """Shows warnings as lines of standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"catversion: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def set_up_logging() -> None:
    """Our warnings go to the console; those of libraries as absl has them."""
    absl.logging.use_absl_handler()
    absl.logging.set_verbosity(absl.logging.WARNING)
    LOGGER.handlers, LOGGER.propagate = [Console()], False
    LOGGER.setLevel(logging.WARNING)


def explain(error: BaseException) -> tuple[str, int] | None:
    """The line that an error is told in, and the exit status; None for a fault of ours, which has a traceback."""
    if isinstance(error, UserError):
        return str(error), MISTAKE
    if isinstance(error, StorageError):
        return str(error), STORAGE
    if isinstance(error, OSError):  # a full disk, a folder that may not be written; files are whole or not there
        where = f"{error.filename}: " if error.filename else ""
        again = "fix that and run the command again (train: with --resume)"
        return f"{where}{error.strerror or short(error)}; {again}", STORAGE if is_storage_error(error) else MISTAKE
    return None


def run_command(name: str, arguments: list[str]) -> int:
    """Runs a sub-command; returns its exit status."""
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{nearest(name, COMMANDS)}")
    set_up_logging()
    module = importlib.import_module(f"catversion_jax.cli.{name}")
    module.define_flags()
    if HELP & set(arguments):
        print(command_help(name, module))
        return 0
    parsed, rest = parse(name, [argument for argument in arguments if argument != "--debug"], positionals(module))
    from catversion_jax.utils import cache

    cache.enable()
    return module.main(parsed, *rest)


def main(argv: list[str] | None = None) -> int:
    """Runs `catversion ARGV`; returns the exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["help"]
    if name == "help" or name in HELP:
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    try:
        return run_command(name, arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        line, status = explained
        print(f"catversion: error: {line}", file=sys.stderr)
        return status


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
