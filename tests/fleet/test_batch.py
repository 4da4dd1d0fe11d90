"""`catversion batch --ray` on clusters of several nodes: whoever is lost, every concept is learned, and none twice."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.methods import concept_file
from tests.commands import TIMEOUT, catversion
from tests.fleet.clusters import PATIENCE, cluster_of, ended, start, wait_for, workers_of
from tests.training.test_many_concepts import LINES, flags, report, write

COUNT = 12
STEPS = 140


def lines() -> list[dict]:
    """As many concepts as keep three workers busy for some seconds; each its own seed."""
    words = [(line["dir"], line["class_word"]) for line in LINES]
    return [
        {"id": f"c{i:02}", "dir": words[i % 4][0], "class_word": words[i % 4][1], "seed": i, "steps": STEPS + i}
        for i in range(COUNT)
    ]


def command_of(model: Path, folder: Path, manifest: list[dict] | None = None) -> list:
    slots = ["--config.batch.slots=2", "--config.batch.previews=0", "--config.checkpoint.every=20"]
    path = write(folder / "list.jsonl", lines() if manifest is None else manifest)
    return [*flags(model, folder / "out", path), *slots]


@pytest.fixture(scope="module")
def expected(tiny_model, tmp_path_factory, one_core) -> dict[str, np.ndarray]:
    """What `catversion batch` learns without Ray."""
    folder = tmp_path_factory.mktemp("one")
    catversion(*command_of(tiny_model, folder))
    return learned(folder / "out")


def learned(out: Path) -> dict[str, np.ndarray]:
    return {path.parent.name: concept_file.load(path).learned["prefix"] for path in out.glob("*/concept.safetensors")}


def check(out: Path, expected: dict[str, np.ndarray]) -> dict[str, dict]:
    """Every concept is that of a run without Ray; returns what became of each."""
    statuses = report(out)
    assert {entry["status"] for entry in statuses.values()} == {"done"}
    found = learned(out)
    assert found.keys() == expected.keys()
    for concept_id, prefix in expected.items():
        np.testing.assert_array_equal(found[concept_id], prefix, err_msg=concept_id)
    return statuses


def finish(process: subprocess.Popen) -> str:
    """Waits for a command that succeeds; returns what it told."""
    out, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    return out + error


def test_a_node_is_lost_and_another_joins(tiny_model, tmp_path, expected):
    run, out = command_of(tiny_model, tmp_path), tmp_path / "out"
    with cluster_of("abc") as nodes:
        process = start(run, nodes.address)
        wait_for(lambda: ended(out) >= 2, process)
        nodes.kill("a")
        nodes.add("d")
        said = finish(process)
    statuses = check(out, expected)
    (told,) = [line for line in said.splitlines() if "warning" in line]
    assert told.endswith("a: a worker was lost with its node; what it had goes to others")
    assert "raylet" not in said
    assert {entry["node"] for entry in statuses.values()} >= {"b", "c", "d"}
    assert all(entry["waited"] > 0 for entry in statuses.values())
    assert not list((out / "checkpoints").iterdir())
    table = catversion("status", out).stdout
    assert "| waited | node |" in table


def test_the_driver_is_killed_and_started_again(tiny_model, tmp_path, expected):
    run, out = command_of(tiny_model, tmp_path), tmp_path / "out"
    with cluster_of("ab") as nodes:
        process = start(run, nodes.address)
        wait_for(lambda: ended(out) >= 2, process)
        process.kill()
        process.wait()
        process = start(run, nodes.address)
        wait_for(lambda: ended(out) >= 6, process)
        process.send_signal(signal.SIGTERM)
        told, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + signal.SIGTERM, error
        assert told.endswith("stopped; the same command continues\n")
        before = ended(out)
        assert before < COUNT
        finish(start(run, nodes.address))
    check(out, expected)


def test_a_worker_that_hangs_and_a_node_that_is_to_go(tiny_model, tmp_path, expected):
    """One is stopped, without an end; another node's loss is announced, and it leaves before."""
    run, out = command_of(tiny_model, tmp_path), tmp_path / "out"
    with cluster_of("abc") as nodes:
        process = start(run, nodes.address, "--ray_patience=20")
        wait_for(lambda: ended(out) >= 2, process)
        nodes.drain("b")
        wait_for(lambda: not workers_of(nodes.by_name["b"]), process)
        assert ended(out) < COUNT
        (hung,) = workers_of(nodes.by_name["a"])
        hung.send_signal(signal.SIGSTOP)
        said = finish(process)
    check(out, expected)
    assert "a: a worker said nothing for 20 s; what it had goes to others" in said
    assert "b: " not in said


POISON = """
import os, sys

def look(event, arguments):
    if event == "open" and "poison" in str(arguments[0]) and str(arguments[0]).endswith(".png"):
        os._exit(9)

if "default_worker.py" in " ".join(sys.orig_argv):
    sys.addaudithook(look)
"""


def test_a_concept_that_crashes_its_worker_fails_alone(tiny_model, tmp_path, expected):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    (tmp_path / "poison").mkdir()
    source = Path(write(tmp_path / "list.jsonl", lines()).parent / LINES[0]["dir"])
    for photo in source.glob("*.png"):
        (tmp_path / "poison" / photo.name).write_bytes(photo.read_bytes())
    manifest = [*lines()[:3], {"id": "bad", "dir": "poison", "class_word": "teapot"}, *lines()[3:6]]
    path = f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with cluster_of("ab", {"PYTHONPATH": path}) as nodes:
        process = start(command_of(tiny_model, tmp_path, manifest), nodes.address)
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, error
    statuses = report(tmp_path / "out")
    assert statuses.pop("bad")["error"].startswith("a worker crashed 3 times with it, the last time with it alone")
    assert statuses.keys() == {line["id"] for line in lines()[:6]}
    assert {entry["status"] for entry in statuses.values()} == {"done"}
    found = learned(tmp_path / "out")
    for concept_id in statuses:
        np.testing.assert_array_equal(found[concept_id], expected[concept_id])


def test_what_every_worker_refuses_ends_the_run(tiny_model, tmp_path):
    """A model that nobody can load is said once, in one line."""
    run = command_of(tiny_model, tmp_path)
    with cluster_of("a") as nodes:
        process = start(run, nodes.address, f"--config.model.path={tmp_path / 'nowhere'}")
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("catversion: error:")]
    assert "nowhere" in line
    assert json.loads((tmp_path / "out" / "config.json").read_text())
