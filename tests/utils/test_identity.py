"""A folder belongs to one config: the same one goes on, and each key that differs is named."""

import json

import pytest

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.identity import claim


def test_a_folder_is_of_one_config(tmp_path):
    path = tmp_path / "run" / "config.json"
    identity = {"seeds": 2, "config": {"train": {"steps": 5, "rate": 0.1}, "prompts": ("a", "b")}}
    claim(path, identity)
    claim(path, identity)
    assert json.loads(path.read_text())["config"]["prompts"] == ["a", "b"]
    other = {"seeds": 2, "config": {"train": {"steps": 6, "rate": 0.1}, "prompts": ("a", "b")}}
    with pytest.raises(UserError) as error:
        claim(path, other)
    assert str(error.value) == (
        f"{path.parent}: belongs to another config (config.train.steps: 5 there, 6 here); "
        "give the same one, or another folder"
    )


def test_many_differences_are_counted(tmp_path):
    path = tmp_path / "config.json"
    claim(path, {f"key{i}": 0 for i in range(9)})
    with pytest.raises(UserError) as error:
        claim(path, {f"key{i}": "x" * 30_000 for i in range(9)})
    assert "key4: 0 there, 'xxx" in str(error.value)
    assert str(error.value).endswith(" and 4 more); give the same one, or another folder")
    assert len(str(error.value)) < 1300


def test_a_key_that_an_older_folder_lacks(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"seed": 1}')
    claim(path, {"seed": 1, "new": 0}, {"new": 0})
    with pytest.raises(UserError, match=r"\(new: 0 there, 1 here\)"):
        claim(path, {"seed": 1, "new": 1}, {"new": 0})


@pytest.mark.parametrize("text", ["[]", "7", "{", ""])
def test_a_file_that_is_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="expected a run's config; choose another folder"):
        claim(tmp_path / "config.json", {"seed": 1})
