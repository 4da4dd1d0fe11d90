"""status.json: what became of each concept, and `catversion status`, which lists it."""

import json

import pytest

from catversion_jax.training.status import (
    DONE,
    FAILED,
    ConceptStatus,
    read_status,
    read_statuses,
    status_files,
    write_status,
)
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of

A = ConceptStatus("a", DONE, photos=5, steps=3, loss=0.5, seconds=1.5, digest="d")
B = ConceptStatus("b", FAILED, "no photos")


@pytest.mark.parametrize("text", ['{"id": "a", "sta', '{"id": ["a"], "status": "done"}', "[]", "7", "[" * 9999, "\0"])
def test_a_damaged_file_counts_as_a_failure(tmp_path, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "status.json").write_text(text)
    found = read_status(tmp_path / "a" / "status.json")
    assert (found.id, found.status) == ("a", FAILED)
    assert "a/status.json: " in found.error


def test_a_link_is_not_followed(tmp_path):
    """Somebody else may have put it into a shared folder."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "status.json").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"status\.json: a symbolic link; expected a file of ours; remove the link"):
        write_status(tmp_path / "a", A)
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_command(tmp_path):
    for status in (A, B):
        write_status(tmp_path / status.id, status)
    assert list(read_statuses(status_files(tmp_path))) == [A, B]
    lines = catversion("status", tmp_path, here=True).stdout.splitlines()
    assert lines[2:] == [
        "| a | done | 5 | 3 | 0.5000 | 1.5 |  |",
        "| b | failed |  |  |  |  | no photos |",
        "",
        "1 concepts done, 1 failed",
    ]
    (failed,) = catversion("status", tmp_path, "--failed", "--json", here=True).stdout.splitlines()
    assert json.loads(failed) == {"id": "b", "status": "failed", "error": "no photos"}
    assert "no concept is done or failed" in error_of("status", tmp_path / "nothing")
