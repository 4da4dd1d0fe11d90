"""The `catversion` command: finds the sub-command, parses its flags, and reports an error in one line."""

import difflib
import importlib
import io
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable
from types import ModuleType

import absl.logging
from absl import flags
from tqdm import tqdm

from catversion_jax import __version__
from catversion_jax.utils.errors import (
    Interrupted,
    StorageError,
    UserError,
    is_out_of_memory,
    is_storage_error,
    listed,
    one_line,
    short,
)
from catversion_jax.utils.log import LOGGER

# Before anything imports it: JAX's C++ log is not for our users.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

COMMANDS = {
    "train": "train a concept on a folder of photos",
    "prepare": "write the photos as training sees them, with a contact sheet and warnings",
    "config": "print a shipped config file, to be edited",
    "generate": "sample images with a learned concept",
    "batch": "train many concepts at once, from a manifest",
    "serve": "learn and draw many people's concepts, over HTTP",
    "ui": "start the service on this machine, and open its page",
    "token": "add a token to a service's file of tokens",
    "status": "list the concepts of a batch's folder: which are done, and why others failed",
    "evaluate": "score images of a concept or a benchmark, sampled here or read from disk",
    "bench": "time the training step at several sizes, also in PyTorch",
    "study": "make a table of docs/results.md: rivals, ablation or together",
    "sweep": "train and score settings on a folder of concepts with held-out photos",
    "convert": "convert an adapter of the paper's authors to a concept, or back",
    "export": "write a concept for PyTorch pipelines and ComfyUI",
    "doctor": "report versions, devices, memory and cache, and what is missing",
}
"""Sub-command, which is a module of this package -> what it does. The module has define_flags() and
main(flags, *positionals) and, if the command takes positional arguments, their names in POSITIONALS."""

MISTAKE, BUG, STORAGE, INTERRUPTED, PIPE_CLOSED = 1, 70, 74, 130, 141
"""Exit statuses of all commands: the user's mistake; an error that we did not foresee (EX_SOFTWARE of sysexits.h);
failed storage (EX_IOERR), after which the same command may work later; Ctrl-C; standard output that its reader closed.
"""

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


def suggestion(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""


def positionals(module: ModuleType) -> tuple[str, ...]:
    """Returns the names of the command's positional arguments."""
    return getattr(module, "POSITIONALS", ())


def command_help(name: str, module: ModuleType) -> str:
    """Returns the help of a command: its flags and, if it takes a config, the config's keys."""
    defined = flags.FLAGS.get_key_flags_for_module(module)
    usage = " ".join(["catversion", name, *positionals(module), "[--FLAG=VALUE ...]"])
    parts = [f"{usage}: {COMMANDS[name]}", "", *map(flag_help, defined)]
    parts.append(entry("--debug", "Show the traceback of an error.", ""))
    if any(flag.name == "config" for flag in defined):
        parts += [
            "",
            "Keys of the config, set by --config.KEY=VALUE, with their defaults, which the config file may change:",
        ]
        parts += ["", *config_help()]
    return "\n".join(parts)


ABSL_MULTI_HELP = ";\n    repeat this option to specify a list of values"
"""What absl adds to the help of a flag that may be repeated; ours says so itself."""


def flag_help(flag: flags.Flag) -> str:
    """Returns a flag's entry in the help, with its default."""
    # absl has the default of --config as the config itself; its help names the file.
    shown = flag.name != "config" and flag.default not in (None, "", [])
    default = f" Default: {joined(flag.default)}." if shown else ""
    return entry(f"--{flag.name}", str(flag.help).removesuffix(ABSL_MULTI_HELP), default)


def joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def entry(name: str, help: str, default: str) -> str:
    return textwrap.fill(f"{name}  {help}{default}", 118, initial_indent="  ", subsequent_indent="      ")


def config_help() -> list[str]:
    """Returns an entry for each key: its name, help and default."""
    from catversion_jax.config import Config
    from catversion_jax.utils.settings import flatten

    return [entry(key, field.metadata["help"], f" Default: {value!r}.") for key, field, value in flatten(Config())]


def parse_flags(name: str, arguments: list[str], expected: tuple[str, ...] = ()) -> tuple[flags.FlagValues, list[str]]:
    """Parses the command's flags and its `expected` positional arguments. Raises UserError for anything else."""
    flags.FLAGS.set_gnu_getopt()  # flags may follow positionals
    # config_flags finds --config.KEY overrides in sys.argv, and nowhere else.
    sys.argv = [f"catversion {name}", *with_config_files(arguments)]
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except flags.Error as error:
        lines = str(error).strip().splitlines()  # a config file's error has its traceback in between
        raise UserError(" ".join(dict.fromkeys([lines[0], lines[-1]]))) from error
    except Exception as error:  # a config file is a program, which may raise anything
        raise UserError(unknown_key(arguments) or not_a_config(arguments, error)) from error
    if rest and not expected:
        raise UserError(f"{rest[0]}: expected only flags; they begin with --")
    if len(rest) != len(expected):
        raise UserError(f"{name}: {len(rest)} arguments; expected {len(expected)}: {' '.join(expected)}")
    return flags.FLAGS, rest


def with_config_files(arguments: list[str]) -> list[str]:
    """Puts the config's file in place of its name. Raises UserError if there is no such config."""
    from catversion_jax.config.shipped import config_source

    found = list(arguments)
    for i, argument in enumerate(arguments):
        if match := re.fullmatch(r"(--?config=)(.*)", argument, re.DOTALL):
            found[i] = f"{match[1]}{config_source(match[2])}"
        elif argument in ("--config", "-config") and i + 1 < len(arguments):
            found[i + 1] = config_source(arguments[i + 1])
    return found


def unknown_key(arguments: list[str]) -> str | None:
    """Returns the error message for the first --config.KEY that the config does not have, None if there is none."""
    from catversion_jax.config import Config
    from catversion_jax.utils.settings import flatten

    keys = [key for key, _, _ in flatten(Config())]
    for argument in arguments:
        key = argument.split("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and key not in keys:
            return f"config.{key}: no such key{suggestion(key, keys)}"
    return None


def not_a_config(arguments: list[str], error: Exception) -> str:
    """Returns the error message for a config file, or a value of one of its keys, that raised an error."""
    given = [argument for argument in arguments if argument.startswith("--config")]
    expected = "expected a file with get_config(), such as catversion config mini prints, and values of its types"
    return f"{listed(given)}: {type(error).__name__}: {short(error)}; {expected}"


class Console(logging.Handler):
    """Shows warnings as lines of standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"catversion: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def set_up_logging() -> None:
    """Sends our warnings to the console, and those of libraries through absl."""
    absl.logging.use_absl_handler()
    absl.logging.set_verbosity(absl.logging.WARNING)
    LOGGER.handlers, LOGGER.propagate = [Console()], False


def explain(error: BaseException, command: str) -> tuple[str, int]:
    """Returns the line that reports an error of a command, and the exit status."""
    if isinstance(error, UserError):
        return str(error), MISTAKE
    if isinstance(error, StorageError):
        return str(error), STORAGE
    if isinstance(error, OSError):  # a full disk, a folder without write access; files are written as a whole or not
        where = f"{error.filename}: " if error.filename else ""
        again = f"fix that and run the command again{' with --resume' if command == 'train' else ''}"
        line = f"{where}{error.strerror or short(error)}; {again}"
        return one_line(line), STORAGE if is_storage_error(error) else MISTAKE
    if is_out_of_memory(error):
        return f"out of memory ({short(error)}); lower the batch size, the slots or the dtype's width", MISTAKE
    if "jax" in sys.modules:
        from catversion_jax.utils.devices import devices_problem

        if reason := devices_problem():
            return reason, MISTAKE
    return f"{type(error).__name__}: {short(error)}; this is a bug: --debug shows where, please report that", BUG


def run_command(name: str, arguments: list[str]) -> int:
    """Runs a sub-command; returns its exit status."""
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{suggestion(name, COMMANDS)}")
    set_up_logging()
    module = importlib.import_module(f"catversion_jax.cli.{name}")
    module.define_flags()
    if HELP & set(arguments):
        print(command_help(name, module))
        return 0
    parsed, rest = parse_flags(name, [argument for argument in arguments if argument != "--debug"], positionals(module))
    from catversion_jax.utils import cache

    cache.enable()
    return module.main(parsed, *rest)


def main(argv: list[str] | None = None) -> int:
    """Runs `catversion ARGV`; returns the exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one whose encoding lacks a character shows that as an escape
            stream.reconfigure(errors="backslashreplace")
    if name == "help" or name in HELP:
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    try:
        status = run_command(name, arguments)
        sys.stdout.flush()  # here, where a reader that has gone can be told from other errors
        return status
    except Interrupted as error:
        return 128 + error.number
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        line, status = explain(error, name)
        print(f"catversion: error: {line}", file=sys.stderr)
        return status


def run() -> None:
    """The entry point of the console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
