"""What nobody foresaw, and machines that lack something: one line, and the way to the traceback."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.cli import generate
from catversion_jax.utils.errors import Interrupted
from tests import tiny
from tests.commands import ENVIRONMENT, ROOT, command, run_here


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ZeroDivisionError("by 0\nmore"), 70, "ZeroDivisionError: by 0; this is a bug: --debug shows where"),
        (RecursionError(), 70, "RecursionError: RecursionError; this is a bug"),
        (AssertionError("\x1b[2J"), 70, r"AssertionError: \x1b[2J; this is a bug"),
        (MemoryError(), 1, "out of memory (MemoryError); lower the batch size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), 1, "out of memory ("),
        (OSError(28, "No space left on device", "/a/b"), 74, "/a/b: No space left on device; fix that"),
        (PermissionError(13, "Permission denied", "/a\nb"), 1, r"/a\nb: Permission denied"),
    ],
)
def test_any_error_is_one_line(monkeypatch, error, status, line):
    def broken(_):
        raise error

    monkeypatch.setattr(generate, "given_concepts", broken)
    done = run_here(("generate",))
    assert done.returncode == status
    (printed,) = done.stderr.splitlines()
    assert printed.startswith(f"catversion: error: {line}")
    assert "Traceback" in run_here(("generate", "--debug")).stderr


def test_a_signal_that_ended_a_training_of_a_larger_work(monkeypatch):
    """Such as SIGTERM in a sweep: the status is that of a training alone."""

    def ended(_):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(generate, "given_concepts", ended)
    assert run_here(("generate",)).returncode == 128 + signal.SIGTERM


def test_without_the_device_that_is_asked_for(tmp_path, tiny_model, tiny_pipeline):
    done = run("doctor", JAX_PLATFORMS="cuda")
    assert done.returncode == 1
    assert "devices:\n  none\n" in done.stdout
    assert "JAX_PLATFORMS=cuda: JAX finds no such device here; unset it" in done.stdout
    assert done.stderr == ""
    concept = tiny.concept(np.zeros((1, 3, 2, 2, 16), np.float32), tiny_pipeline.fingerprint, tiny_model)
    tiny.save_run(tmp_path / "concept.safetensors", concept)
    asked = ("generate", f"--embedding={tmp_path}", "--prompt=a teapot", f"--out={tmp_path / 'out'}")
    done = run(*asked, JAX_PLATFORMS="cuda")
    assert done.returncode == 1
    assert "catversion: error: JAX_PLATFORMS=cuda: JAX finds no such device here" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_without_the_letters(tmp_path):
    """Such as a pipe of a cron job, whose encoding is ASCII."""
    done = run("generate", f"--embedding={tmp_path / 'Teekännchen'}", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 1
    assert "Teek\\xe4nnchen: not found" in done.stderr


def test_a_user_without_a_home(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    done = run_here(("doctor",))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/catversion_jax-{os.getuid()}/xla: 0 programs" in done.stdout
