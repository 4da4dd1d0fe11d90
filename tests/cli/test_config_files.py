"""Config files and values that are none: each in one line that names them."""

import pytest

from tests.commands import error_of


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"def x(:\n", "SyntaxError: invalid syntax"),
        ("# é\nx = 'é'\n".encode("latin-1"), "SyntaxError"),
        (b"\0", "SyntaxError"),
        (b"x = 1\n", "AttributeError: module"),
        (b"def get_config():\n  return 1 / 0\n", "ZeroDivisionError: division by zero"),
        (b"import nothing_of_this_name\n", "ModuleNotFoundError"),
        (b"raise ValueError('\\x1b[2J\\n' * 9999)\n", r"Error whilst parsing config file: \x1b[2J"),
        (b"def get_config():\n  return {'a': 1}\n", "config.a: no such key"),
        (b"def get_config():\n  return {'train': 1}\n", "config.train: expected a section with keys"),
    ],
)
def test_files(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_bytes(source)
    line = error_of("train", f"--config={path}")
    assert message in line
    assert str(path) in line or "config." in line
    assert len(line) < 1400


@pytest.mark.parametrize(
    "value",
    [
        "train.steps=x", "train.steps=1e9", "train=3", "run_dir=half \udcff", "seed=None", "concept.templates=('a','b",
        "x.y.z=1", "concept.templates=[[[[]]]]", "train.learning_rate=nan", "mesh.fsdp=-1",
    ],
)  # fmt: skip
def test_values(tmp_path, value):
    key = value.split("=")[0]
    given = [f"--config.run_dir={tmp_path / 'run'}", f"--config.data.dir={tmp_path}", "--config.concept.class_word=mug"]
    line = error_of("train", "--config=configs/mini.py", *given, f"--config.{value}")
    assert key.split(".")[-1] in line
    assert not (tmp_path / "run").exists()
