"""JSON that is read back: checked against what it was declared to be."""

import os
from dataclasses import dataclass

import pytest

from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError


@dataclass(frozen=True)
class Thing:
    id: str
    step: int
    loss: float | None = None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"id": 7, "step": 1}', r"Expected `str`, got `int` - at `\$.id`"),
        (b'{"id": "a"}', "missing required field `step`"),
        (b'{"id": "a", "step": 1.5}', "Expected `int`, got `float`"),
        (b'{"id": "a", "step": true}', "Expected `int`, got `bool`"),
        (b'{"id": "a", "step": 1, "loss": NaN}', "not JSON"),
        (b'{"id": "a", "step": 1, "loss": 1e999}', "out of range"),
        (b'{"id": "a", "step": 1}{}', "trailing characters"),
        (b'{"id": "a\xff", "step": 1}', "not JSON|utf-8"),
        (b'{"id": "\\ud800", "step": 1}', "not JSON"),
        (b'{"id": ' + b"[" * 10**5, "nested too deeply|Expected `str`"),
        (b'{"other": ' + b"[" * 10**5, "nested too deeply"),
    ],
)
def test_refused(tmp_path, data, message):
    path = tmp_path / "thing.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        records.read_record(path, Thing, "expected a thing")
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith("expected a thing")


def test_read(tmp_path):
    path = tmp_path / "thing.json"
    path.write_bytes(b'\xef\xbb\xbf{"id": "\xc3\xa9", "step": 1, "more": 2}')
    assert records.read_record(path, Thing) == Thing("é", 1)
    with pytest.raises(UserError, match="nowhere: not found; expected a thing"):
        records.read_record(tmp_path / "nowhere", Thing, "expected a thing")
    with path.open("wb") as file:
        file.truncate(records.MOST_BYTES + 1)
    with pytest.raises(UserError, match="larger than 16 MiB"):
        records.read_record(path, Thing)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        records.read_record(tmp_path / "pipe", Thing)


def test_lines(tmp_path, caplog):
    """Lines that a crash has cut, or that are something else, are left out, with one warning that counts them."""
    path = tmp_path / "things.jsonl"
    assert list(records.read_lines(path, Thing)) == []
    for i in range(3):
        records.append_line(path, Thing(f"thing {i}", i))
    expected = [Thing(f"thing {i}", i) for i in range(3)]
    assert list(records.read_lines(path, Thing)) == expected
    assert not caplog.messages
    with path.open("ab") as file:
        file.write(b'{"id": "\xff", "step": 1}\n[3]\n\n{"id": "a", "st')
    assert list(records.read_lines(path, Thing)) == expected
    (message,) = caplog.messages
    assert "things.jsonl: 3 unreadable lines left out, as after a crash (line 4" in message
    records.append_line(path, Thing("after", 4))  # on a line of its own
    assert list(records.read_lines(path, Thing)) == [*expected, Thing("after", 4)]


def test_numbers_that_json_lacks():
    assert records.encode({"loss": float("nan"), "more": float("inf")}) == '{"loss":null,"more":null}'
