"""What a worker takes of a node, and what is said where there is no cluster."""

import builtins
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from catversion_jax.fleet.cluster import Node, Seat, environment, needs_of, seats
from catversion_jax.fleet.host import alone_on_tpu
from catversion_jax.utils.errors import UserError
from tests.commands import ENVIRONMENT, ROOT, error_of
from tests.fleet.clusters import RAY
from tests.training.test_distributed import free_port

HEAD = Node("0", "head", {"CPU": 8.0, "memory": 1e9})
TPU = Node("1", "tpu", {"CPU": 100.0, "TPU": 4.0})
GPUS = Node("2", "gpus", {"CPU": 32.0, "GPU": 3.0})


@pytest.mark.parametrize(
    ("nodes", "given", "expected"),
    [
        ([HEAD], None, {("head", 0): {"CPU": 8.0}}),
        ([HEAD, TPU], None, {("tpu", 0): {"TPU": 4.0}}),
        ([HEAD, GPUS], None, {("gpus", i): {"GPU": 1} for i in range(3)}),
        ([TPU], {"TPU": 1}, {("tpu", i): {"TPU": 1} for i in range(4)}),
        ([GPUS, HEAD], {"GPU": 2, "CPU": 4}, {("gpus", 0): {"GPU": 2, "CPU": 4}}),
        ([HEAD], {"CPU": 3}, {("head", i): {"CPU": 3} for i in range(2)}),
        ([HEAD], {"TPU": 4}, {}),
        ([], None, {}),
    ],
)
def test_every_gpu_and_every_tpu_host_has_a_place(nodes, given, expected):
    found = seats(nodes, given)
    assert {(seat.node, seat.number): needs for seat, needs in found.items()} == expected
    assert all(isinstance(seat, Seat) for seat in found)


def test_a_worker_without_an_accelerator_computes_with_its_own_cores():
    assert environment({"CPU": 3.0}) == {"NPROC": "3", "JAX_PLATFORMS": "cpu"}
    assert environment({"CPU": 3.0, "GPU": 1}) == environment({"TPU": 4}) == {}


def test_a_worker_does_not_wait_for_the_other_hosts_of_its_slice(monkeypatch):
    monkeypatch.setenv("TPU_VISIBLE_CHIPS", "0,1,2,3")
    assert alone_on_tpu()["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "2,2,1"
    monkeypatch.delenv("TPU_VISIBLE_CHIPS")
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    assert alone_on_tpu() == {}


@pytest.mark.parametrize(
    "text", ["", "4", "[]", "{}", '{"TPU": "4"}', '{"TPU": 0}', '{"TPU": true}', '{"GPU": -1}', "{"]
)
def test_what_a_worker_takes_is_checked(text):
    with pytest.raises(UserError, match=r"^--ray_resources=.*what one worker takes"):
        needs_of(text)


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_ray(name, *arguments, **keywords):
        if name.split(".")[0] == "ray":
            raise ImportError(name="ray")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    (tmp_path / "list.jsonl").write_text('{"id": "a", "dir": "x", "class_word": "teapot"}')
    error = error_of("batch", "--config=mini", f"--manifest={tmp_path}/list.jsonl",
                     f"--config.run_dir={tmp_path}/out", "--ray=local")  # fmt: skip
    assert error == "catversion: error: --ray: Ray is not installed; pip install 'catversion-jax[ray]'"


CONNECT = """
import sys
from catversion_jax.fleet.cluster import connected
with connected(sys.argv[1]) as ray:
    print(len(ray.nodes()))
"""


def test_a_cluster_that_asks_for_a_token(tmp_path):
    """As `ray start` makes it where there is one: whoever gives its address has to say that there is."""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_AUTH_MODE"}
    environment |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 32)
    port = free_port()
    place = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # with a short path: its sockets are there
    head = subprocess.Popen(
        [*RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0", "--include-dashboard=false",
         f"--temp-dir={place}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def connect(**variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", CONNECT, f"127.0.0.1:{port}"],
            env=environment | variables, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip

    try:
        until = time.monotonic() + 60
        while (found := connect(RAY_AUTH_MODE="token")).returncode and time.monotonic() < until:
            assert head.poll() is None
        assert found.stdout == "1\n", found.stderr
        refused = connect()
        assert refused.returncode
        assert refused.stderr.splitlines()[-1].endswith("if it asks for a token, set RAY_AUTH_MODE=token")
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)


def test_the_address_of_a_cluster_that_has_ended(tmp_path, monkeypatch):
    """A head that was killed leaves its address behind, and Ray would wait for it for minutes."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    (tmp_path / "list.jsonl").write_text('{"id": "a", "dir": "x", "class_word": "teapot"}')
    error = error_of("batch", "--config=mini", f"--manifest={tmp_path}/list.jsonl",
                     f"--config.run_dir={tmp_path}/out", "--ray=auto")  # fmt: skip
    assert error.startswith("catversion: error: --ray=auto: no Ray cluster answers ([Errno 111]")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ray=127.0.0.1:1"], "--ray=127.0.0.1:1: no Ray cluster answers"),
        (["--ray=here"], "--ray=here: no Ray cluster answers"),
        (["--ray=auto"], "--ray=auto: no Ray cluster answers"),
        (["--ray=local", "--num_processes=2", "--process_id=0"], "--ray: hands out the concepts by itself"),
        (["--ray=local", "--ray_resources=4"], "--ray_resources=4: expected what one worker takes"),
    ],
)
def test_mistakes(tmp_path, flags, expected):
    (tmp_path / "list.jsonl").write_text('{"id": "a", "dir": "x", "class_word": "teapot"}')
    error = error_of("batch", "--config=mini", f"--manifest={tmp_path}/list.jsonl",
                     f"--config.run_dir={tmp_path}/out", *flags)  # fmt: skip
    assert error.startswith(f"catversion: error: {expected}")
    assert "\n" not in error
