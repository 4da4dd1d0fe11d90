"""report.jsonl: lines that a crash, or another process, has damaged are dropped, and the others stay."""

import pytest

from catversion_jax.training.report import DONE, FAILED, Report, ReportEntry
from catversion_jax.utils.errors import UserError

A = ReportEntry("a", DONE, steps=3, loss=0.5, seconds=1.5, digest="d")
TAILS = [
    b'{"id": "b", "sta', b'{"id": ["b"], "status": "done"}\n', b'{"status": "done"}\n', b'{"id": "b"}\n', b"[]\n",
    b"7\n", b"\xff\xfe\n", b'{"id": "b", "status": "done", "loss": "low"}\n', b"[" * 9999, b"\x00\x00\n",
]  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
def test_a_damaged_line_is_dropped(tmp_path, caplog, tail):
    report = Report(tmp_path)
    report.add(A)
    with report.path.open("ab") as file:
        file.write(tail)
    report.add(ReportEntry("c", FAILED, "no photos"))  # on a line of its own
    assert list(report.entries()) == [A, ReportEntry("c", FAILED, "no photos")]
    report.reconcile({"a": True, "b": True, "c": False})
    assert list(report.entries()) == [A, ReportEntry("b", DONE)]
    assert "1 unreadable line left out, as after a crash (line 2:" in caplog.text


def test_a_line_of_an_older_version(tmp_path):
    report = Report(tmp_path)
    report.path.write_text('{"id": "a", "status": "done", "steps": 3, "loss": NaN, "seconds": 1}\n')
    report.path.write_text('{"id": "a", "status": "done", "steps": 3, "loss": 0.5, "seconds": 1.5}\n')
    (entry,) = report.entries()
    assert (entry.steps, entry.digest) == (3, None)


def test_a_link_is_not_followed(tmp_path):
    """Somebody else may have put it into a shared folder."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"report\.jsonl: a symbolic link; expected a file of ours; remove the link"):
        Report(tmp_path / "out").reconcile({"a": True})
    assert (tmp_path / "mine").read_text() == "precious"
