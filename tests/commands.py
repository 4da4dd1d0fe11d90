"""Run the `catversion` command as a user does: its main in this process if that is enough, else in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from absl import flags

from catversion_jax.cli.main import main
from catversion_jax.utils.log import LOGGER
from tests.conftest import FAST_COMPILE

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(ROOT)}
TIMEOUT = 600
LIBRARIES = ("array_record", "grain", "orbax", "tensorflow_datasets")
"""Whose flags are defined when they are imported."""

HERE = {"convert", "evaluate", "export", "generate"}
"""Commands that are quick once JAX is imported and their programs are compiled; the others take over the process."""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "catversion_jax", *map(str, arguments)]


def catversion(
    *arguments: object, status: int = 0, full_disk: bool = False, here: bool | None = None
) -> subprocess.CompletedProcess:
    """Run to the end and check the exit status; no run may show a traceback. On a full disk no file grows beyond
    three kilobytes. `here`: in this process; by default those of HERE, and all that are refused."""
    if here is None:
        here = not full_disk and (status == 1 or (bool(arguments) and arguments[0] in HERE))
    done = run_here(arguments) if here else run_apart(arguments, full_disk)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_apart(arguments: tuple[object, ...], full_disk: bool) -> subprocess.CompletedProcess:
    run = command(*arguments)
    if full_disk:
        run = ["bash", "-c", 'ulimit -f 3; exec "$@"', "bash", *run]
    return subprocess.run(run, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)


def run_here(arguments: tuple[object, ...]) -> subprocess.CompletedProcess:
    """The command's main, which leaves nothing behind: neither flags, nor its logging, nor the environment."""
    before, argv, environment, folder = set(flags.FLAGS), sys.argv, dict(os.environ), Path.cwd()
    logging = LOGGER.handlers, LOGGER.propagate
    out, err = io.StringIO(), io.StringIO()
    os.chdir(ROOT)
    sys.argv = ["catversion", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(map(str, arguments)))
    finally:
        os.chdir(folder)
        # Those that libraries defined when they were first imported stay: nothing defines them again.
        for name in set(flags.FLAGS) - before:
            if not str(flags.FLAGS.find_module_defining_flag(name)).startswith(LIBRARIES):
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # the config file, which ml_collections would take for the next one
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        LOGGER.handlers, LOGGER.propagate = logging
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def error_of(*arguments: object, status: int = 1, full_disk: bool = False) -> str:
    """The one line that a refused command prints."""
    done = catversion(*arguments, status=status, full_disk=full_disk)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("catversion: error:")]
    return line
