"""Several processes on one machine that share a manifest: each takes its own lines, and a lost one is made up for."""

import json
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.methods import concept_file
from catversion_jax.training import distributed
from tests.commands import ENVIRONMENT, ROOT, TIMEOUT, catversion, command, error_of
from tests.training.test_many_concepts import LINES, flags, report, write


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(run: list[str], count: int, index: int, *extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*run, f"--num_processes={count}", f"--process_id={index}", *extra),
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(tiny_model, tmp_path_factory) -> dict[str, np.ndarray]:
    """What one process learns."""
    folder = tmp_path_factory.mktemp("one")
    catversion(*flags(tiny_model, folder / "out", write(folder / "list.jsonl", LINES)))
    return {line["id"]: concept_file.load(folder / "out" / line["id"]).learned["prefix"] for line in LINES}


def check(out: Path, expected: dict[str, np.ndarray]) -> None:
    assert {entry["status"] for entry in report(out).values()} == {"done"}
    for id, prefix in expected.items():
        np.testing.assert_allclose(concept_file.load(out / id).learned["prefix"], prefix, atol=1e-4)


def test_processes_share_a_manifest(tiny_model, tmp_path, expected):
    """Three processes: their shares of the manifest differ in size."""
    count = 3
    run = flags(tiny_model, tmp_path / "out", write(tmp_path / "list.jsonl", LINES))
    coordinator = f"--coordinator_address=127.0.0.1:{free_port()}"
    processes = [start(run, count, index, coordinator) for index in range(count)]
    for process in processes:
        _, error = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, error
    check(tmp_path / "out", expected)
    assert {folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir()} == {
        f"{index}-of-{count}" for index in range(count)
    }


def test_a_lost_process_is_made_up_for(tiny_model, tmp_path, expected):
    """Process 1 of 2 is killed; process 0 finishes its share, and process 1, started again alone, its own. Nobody waits
    for anybody but at the start."""
    path = write(tmp_path / "list.jsonl", LINES)
    run = flags(tiny_model, tmp_path / "out", path)
    coordinator = f"--coordinator_address=127.0.0.1:{free_port()}"
    first, lost = (start(run, 2, index, coordinator) for index in range(2))
    while not (tmp_path / "out" / "config.json").exists():  # both have met by then
        assert first.poll() is None
        assert lost.poll() is None
    lost.kill()
    lost.communicate()
    _, error = first.communicate(timeout=TIMEOUT)
    assert first.returncode == 0, error
    assert report(tmp_path / "out").keys() == {"a", "c"}
    again = start(run, 2, 1)
    _, error = again.communicate(timeout=TIMEOUT)
    assert again.returncode == 0, error
    check(tmp_path / "out", expected)


def test_a_process_that_waits_in_vain(tiny_model, tmp_path):
    path = write(tmp_path / "list.jsonl", LINES)
    run = flags(tiny_model, tmp_path / "out", path)
    address = f"127.0.0.1:{free_port()}"
    line = error_of(
        *run, "--num_processes=2", "--process_id=1", f"--coordinator_address={address}", "--start_timeout=2"
    )
    assert f"{address}: process 1 did not meet all 2 processes there within 2 s; start all of them" in line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--num_processes=2"], "--num_processes and --process_id: expected both or none"),
        (["--num_processes=2", "--process_id=2"], "--process_id=2: expected 0 to 1"),
        (
            ["--coordinator_address=here:1"],
            "--coordinator_address: needs --num_processes and --process_id, or --distributed",
        ),
        (["--distributed"], "none of SLURM_NTASKS, "),
    ],
)
def test_mistakes(tmp_path, given, expected):
    (tmp_path / "list.jsonl").write_text(json.dumps(LINES[0]))
    line = error_of("batch", "--config=configs/mini.py", f"--manifest={tmp_path / 'list.jsonl'}", *given)
    assert expected in line


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, (2, 3)),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, (1, 4)),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}, (0, 1)),
    ],
)
def test_what_a_cluster_tells(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.from_environment() == distributed.Process(*expected)


def test_one_process_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(distributed, "subprocess", None)
    distributed.meet("nowhere:1", distributed.Process(0, 1), timeout=1)
