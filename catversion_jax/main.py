"""The `catversion` command: finds the sub-command, parses its flags, and turns mistakes into one line."""

import difflib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from absl import flags, logging

from catversion_jax import __version__
from catversion_jax.errors import UserError

# Before anything imports them: JAX's C++ log and transformers' advice are not for our users.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

COMMANDS = {
    "train": ("train", "learn a concept from a folder of photos"),
    "generate": ("generate", "draw pictures with a learned concept"),
    "batch": ("batch", "learn many concepts at once, from a manifest"),
    "evaluate": ("evaluate", "score pictures of a concept, drawn here or before; benchmarks"),
    "bench": ("bench.command", "time the training step, for many sizes, and against PyTorch"),
    "study": ("study.command", "the paper's tables: CatVersion against its rivals, and its ablation"),
    "sweep": ("sweep", "train and score settings on a folder of concepts with held-out photos"),
    "convert": ("convert.command", "an adapter of the paper's authors to a concept, or back"),
    "export": ("export", "a learned concept for PyTorch pipelines and ComfyUI"),
    "doctor": ("doctor", "devices, versions, memory, cache: what is there and what is missing"),
}
"""Sub-command -> its module in catversion_jax and what it does. The module has define_flags() and
main(flags, *positionals); where the command takes positionals, POSITIONALS names them."""


def usage() -> str:
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            f"catversion {__version__}: usage: catversion COMMAND [--FLAG=VALUE ...]",
            "",
            *lines,
            "",
            "catversion COMMAND --help lists the command's flags.",
        ]
    )


def nearest(word: str, words) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""


def positionals(module: ModuleType) -> tuple[str, ...]:
    """What the command takes besides flags."""
    return getattr(module, "POSITIONALS", ())


def command_help(name: str, module: ModuleType) -> str:
    """The flags that the command's module defines or adopts."""
    defined = flags.FLAGS.get_key_flags_for_module(module)
    lines = [f"  --{flag.name}: {flag.help} (default: {flag.default})" for flag in defined]
    usage = " ".join(["catversion", name, *positionals(module)])
    return "\n".join([f"{usage}: {COMMANDS[name][1]}", "", *lines])


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
        raise UserError(" ".join(dict.fromkeys([lines[0], lines[-1]]))) from None
    except (AttributeError, KeyError) as error:
        raise UserError(unknown_key(arguments) or str(error)) from None
    if rest and not expected:
        raise UserError(f"{rest[0]}: expected only flags; they begin with --")
    if len(rest) != len(expected):
        raise UserError(f"{name}: {len(rest)} arguments; expected {len(expected)}: {' '.join(expected)}")
    return flags.FLAGS, rest


def unknown_key(arguments: list[str]) -> str | None:
    """What to say of the first --config.KEY that the config file does not have."""
    from catversion_jax.config import default, flat

    keys = list(flat(default()))
    for argument in arguments:
        key = argument.split("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and key not in keys:
            return f"config.{key}: no such key{nearest(key, keys)}"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run `catversion ARGV`; returns the exit status."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["help"]
    if name in ("help", "--help", "-h"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    try:
        if name not in COMMANDS:
            raise UserError(f"{name}: no such command{nearest(name, COMMANDS)}")
        logging.use_absl_handler()
        logging.set_verbosity(logging.WARNING)
        module = importlib.import_module(f"catversion_jax.{COMMANDS[name][0]}")
        module.define_flags()
        if {"--help", "-h", "-help"} & set(arguments):
            print(command_help(name, module))
            return 0
        parsed, rest = parse(name, arguments, positionals(module))
        from catversion_jax import cache

        cache.enable()
        return module.main(parsed, *rest)
    except UserError as error:
        print(f"catversion: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written; files are whole or not there
        where = f"{error.filename}: " if error.filename else ""
        again = "mend that and run the command again (train: with --resume)"
        print(f"catversion: error: {where}{error.strerror or error}; {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
