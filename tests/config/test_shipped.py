"""Configs by name, and the wheel: what is installed has the configs, the mini model and the concepts."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.commands import ROOT, catversion, error_of

PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "catversion_jax", "configs")


def test_a_config_is_printed_edited_and_used(tmp_path):
    printed = catversion("config", "sd15", here=True).stdout
    assert printed == (ROOT / "configs" / "sd15.py").read_text()
    mine = tmp_path / "mine.py"
    mine.write_text(printed.replace('"catversion"', '"nothing"'))
    assert "nothing: no such method" in error_of("train", f"--config={mine}")


@pytest.mark.parametrize(
    "flags", [["--config=mini"], ["--config", "mini"], ["-config=mini:dreambooth"], ["--config=configs/mini.py"]]
)
def test_names_and_paths(flags):
    assert "config.run_dir" in error_of("train", *flags)


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    (tmp_path / "mini").write_text("")
    from catversion_jax.config.shipped import config_source

    monkeypatch.chdir(tmp_path)
    assert config_source("mini:x") == "mini:x"
    assert config_source("sd15:x") == f"{ROOT / 'configs' / 'sd15.py'}:x"


@pytest.mark.parametrize(
    "command", [["config", "sd16"], ["train", "--config=sd16"], ["train", "--config=configs/x.py"]]
)
def test_unknown_names(command):
    line = error_of(*command)
    assert "no such config file; expected a path, or one of mini, sd14, sd15" in line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's files, in a folder that has nothing else."""
    built = tmp_path_factory.mktemp("built")
    source = built / "source"  # a build writes beside its sources
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={built}", source], check=True
    )
    (path,) = built.glob("*.whl")
    zipfile.ZipFile(path).extractall(built / "installed")
    return built / "installed"


def test_the_wheel_trains_and_samples_outside_a_checkout(wheel, tmp_path, tiny_model):
    environment = os.environ | {"PYTHONPATH": str(wheel)}

    def run(*arguments):
        run = [sys.executable, "-m", "catversion_jax", *arguments]
        return subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    where = "import catversion_jax; print(catversion_jax.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], cwd=tmp_path, env=environment, text=True)
    assert found.startswith(str(wheel))
    assert run("config", "mini") == (ROOT / "configs" / "mini.py").read_text()
    photos = wheel / "catversion_jax" / "concepts" / "teapot" / "train"
    values = {"run_dir": "run", "data.dir": photos, "concept.class_word": "teapot", "model.path": tiny_model}
    values |= {"train.steps": 2, "sample.every": 0, "sample.steps": 2}
    run("train", "--config=mini", *(f"--config.{key}={value}" for key, value in values.items()))
    run("generate", "--embedding=run", "--prompt=a teapot", "--num=1")
    assert len([*(tmp_path / "pictures").glob("a-teapot_*_0.png")]) == 1
