"""What docs/api.md and the notebook say is run as it stands."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.commands import ENVIRONMENT, ROOT, TIMEOUT

PAGE = ROOT / "docs" / "api.md"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture
def folder(tmp_path):
    """A folder in which the paths of the examples lead to the shipped concepts, and nothing else."""
    (tmp_path / "catversion_jax").mkdir()
    (tmp_path / "catversion_jax" / "concepts").symlink_to(ROOT / "catversion_jax" / "concepts")
    return tmp_path


def run(code: str, folder) -> str:
    """Runs a program that imports the package as it is installed."""
    path = folder / "examples.py"
    path.write_text(code)
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    done = subprocess.run(
        [sys.executable, path], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_of_the_page(folder, tiny_model):
    """With the tiny model in place of the mini model, which the notebook runs with."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    instead = "import pathlib, catversion_jax.base.pipeline as base\n"
    instead += f"base.MINI = pathlib.Path({str(tiny_model)!r})\n"
    out = run("\n".join([instead, *blocks]), folder)
    assert re.match(r"4 \d\.\d+\n", out), out
    assert (folder / "beach.png").is_file()
    assert (folder / "owl.safetensors").is_file()
    assert (folder / "runs" / "teapot" / "concept.safetensors").is_file()


def test_the_notebook(folder):
    """Every cell but those of another runtime, with fewer steps."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "it is kept without outputs"
    sources = ["".join(cell["source"]) for cell in cells]
    code = "\n".join(source for source in sources if not source.startswith(("%", "# For a GPU or a TPU")))
    assert "steps=200" in code
    out = run("display = print\n" + code.replace("steps=200", "steps=2"), folder)
    assert "step 2: loss 0." in out
    assert out.count("<PIL.") == 2
