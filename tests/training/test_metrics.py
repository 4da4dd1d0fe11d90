"""metrics.jsonl and the events: a run that was killed while it wrote them goes on."""

import socket

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from catversion_jax.training.metric_writer import MetricRow, MetricWriter
from catversion_jax.utils.errors import StorageError

ROWS = [MetricRow(step, loss=0.1 * step, learning_rate=1e-5, grad_norm=0.5) for step in (1, 2, 3)]
GOOD = (
    b'{"step":1,"loss":0.1,"learning_rate":0.00001,"grad_norm":0.5}\n'
    b'{"step":2,"loss":0.2,"learning_rate":0.00001,"grad_norm":0.5}\n'
)


def write(folder, rows, start=0):
    writer = MetricWriter(folder / "metrics.jsonl", folder / "events", start)
    for row in rows:
        writer.row(row)
    writer.close()
    return (folder / "metrics.jsonl").read_bytes()


def events(folder) -> list:
    found = []
    for path in sorted((folder / "events").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_a_resumed_run_continues_its_files(tmp_path):
    """What the interrupted one wrote after its checkpoint is dropped: the files are those of an unbroken run."""
    assert write(tmp_path, ROWS[:2]) == GOOD
    (tmp_path / "whole").mkdir()
    whole = write(tmp_path / "whole", ROWS)
    assert write(tmp_path, ROWS[1:], start=1) == whole
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 2]  # from which TensorBoard drops what older files have
    values = {(event.step, value.tag) for event in events(tmp_path) for value in event.summary.value}
    assert values == {(step, tag) for step in (1, 2, 3) for tag in ("loss", "learning_rate", "grad_norm")}


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step":3,"lo', b'{"step":"3"}\n', b'{"loss":1}\n', b"[1]\n", b"\xff\xfe\n", b"null\n", b'{"step":[3]}\n',
        b"[" * 9999,
    ],
)  # fmt: skip
def test_lines_that_are_none(tmp_path, caplog, tail):
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + tail)
    assert write(tmp_path, [], start=2) == GOOD
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path}/metrics.jsonl: 1 unreadable line left out, as after a crash (line 3:")


def test_a_row_of_an_older_version(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1, "learning_rate": 1e-05, "grad_norm": 0.5}\n')
    assert write(tmp_path, [], start=2) == GOOD.splitlines(keepends=True)[0]


def test_the_events_do_not_name_the_host(tmp_path):
    writer = MetricWriter(tmp_path / "metrics.jsonl", tmp_path / "events", 0)
    writer.image(3, "validation", np.zeros((2, 4, 3), np.uint8))
    writer.close()
    (path,) = (tmp_path / "events").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    assert path.name.removeprefix("events.out.tfevents.").isdigit()
    assert socket.gethostname().encode() not in path.read_bytes()
    (image,) = [value.image for event in events(tmp_path) for value in event.summary.value]
    assert (image.height, image.width) == (2, 4)


def test_a_full_disk(tmp_path):
    writer = MetricWriter(tmp_path / "metrics.jsonl", tmp_path / "events", 0)
    writer._metrics = open("/dev/full", "wb")  # noqa: SIM115  # the writer closes it
    with pytest.raises(StorageError, match=r"metrics\.jsonl: could not write the metrics .*; make room"):
        writer.row(ROWS[0])
