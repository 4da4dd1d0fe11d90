"""Run the `catversion` command as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import FAST_COMPILE

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(ROOT)}
TIMEOUT = 600


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "catversion_jax", *map(str, arguments)]


def catversion(*arguments: object, status: int = 0, full_disk: bool = False) -> subprocess.CompletedProcess:
    """Run to the end and check the exit status; no run may show a traceback. On a full disk no file grows beyond
    two kilobytes."""
    run = command(*arguments)
    if full_disk:
        run = ["bash", "-c", 'ulimit -f 2; exec "$@"', "bash", *run]
    done = subprocess.run(run, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def error_of(*arguments: object, status: int = 1, full_disk: bool = False) -> str:
    """The one line that a refused command prints."""
    done = catversion(*arguments, status=status, full_disk=full_disk)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("catversion: error:")]
    return line
