"""Nothing accepted is lost: killed at any moment, with a full disk, or beside a job that is poisoned."""

import contextlib
import random
import resource
import socket
import sqlite3
import threading
import time

import psutil
import pytest

from tests import tiny
from tests.service.servers import Running, detail, ended, learn, photos, running, wait_for

NAMES = ("teapot", "dog", "owl")
POISON = """
from catversion_jax.training import engine

prepare = engine.prepare

def spoiled(config, *rest):
    data = prepare(config, *rest)
    return data.replace(mean=data.mean * float("nan")) if config.concept.class_word == "owl" else data

engine.prepare = spoiled
"""


def bytes_of(server: Running, concept_id: str) -> bytes:
    return server.client.get(f"/v1/concepts/{concept_id}/concept.safetensors").content


@pytest.fixture(scope="module")
def expected(tiny_model, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted server learns of each name."""
    with running(tmp_path_factory.mktemp("whole") / "store", tiny_model) as server:
        ids = {name: learn(server.client, name)["id"] for name in NAMES}
        return {name: bytes_of(server, ended(server.client, concept_id)["id"]) for name, concept_id in ids.items()}


def test_killed_and_started_again(tiny_model, tmp_path, expected):
    """Every job ends once, and each concept has the bytes of its uninterrupted run."""
    rng = random.Random(1)
    server = Running(tmp_path / "store", tiny_model)
    ids = {name: learn(server.client, name, {"Idempotency-Key": name})["id"] for name in NAMES}
    for turn in range(4):
        if turn % 2 == 0:
            server.ready()
        time.sleep(rng.uniform(0, 1.5))
        server.kill()
        server = Running(tmp_path / "store", tiny_model)
        assert {name: learn(server.client, name, {"Idempotency-Key": name})["id"] for name in NAMES} == ids
    for name, concept_id in ids.items():
        assert ended(server.client, concept_id)["status"] == "done"
        assert bytes_of(server, concept_id) == expected[name]
    assert len(server.client.get("/v1/concepts").json()["concepts"]) == len(NAMES)
    assert not list((tmp_path / "store" / "incoming").iterdir())
    assert server.stop() == 0


def test_pictures_outlive_a_kill(tiny_model, tmp_path):
    server = Running(tmp_path / "store", tiny_model).ready()
    concept = ended(server.client, learn(server.client)["id"])
    asked = [{"prompt": "a teapot", "concepts": [{"id": concept["id"]}], "seed": seed} for seed in range(40)]
    pictures = server.client.post("/v1/pictures", json={"pictures": asked}).json()["pictures"]
    wait_for(lambda: list((tmp_path / "store" / "pictures").glob("[0-9a-f]*.png")), server)
    server.kill()
    server = Running(tmp_path / "store", tiny_model).ready()
    times = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "store" / "pictures").glob("*.png")}
    for picture in pictures:
        wait_for(lambda path=f"/v1/pictures/{picture['id']}": server.client.get(path).json()["status"] == "done")
    for picture_id, written in list(times.items())[:1]:  # what was drawn is not drawn again
        assert (tmp_path / "store" / "pictures" / f"{picture_id}.png").stat().st_mtime_ns == written
    server.kill()


def test_what_a_crash_leaves(tiny_model, tmp_path):
    """Half of a request, photos without a row, half of a picture, a concept's file without its note: all in order."""
    store = tmp_path / "store"
    with running(store, tiny_model) as server:
        concept = ended(server.client, learn(server.client)["id"])
        before = bytes_of(server, concept["id"])
    (store / "incoming" / "half" / "photos").mkdir(parents=True)
    (store / "incoming" / "half" / "photos" / "000.png").write_bytes(b"x")
    (store / "concepts" / ("f" * 24)).mkdir()
    (store / "pictures" / ".0123.png").write_bytes(b"x")
    with sqlite3.connect(store / "jobs.sqlite") as database:
        database.execute("UPDATE concepts SET status = 'training', previewed = 0, ended = NULL")
    written = (store / "concepts" / concept["id"] / "concept.safetensors").stat().st_mtime_ns
    with running(store, tiny_model) as server:
        assert ended(server.client, concept["id"])["status"] == "done"
        assert bytes_of(server, concept["id"]) == before
        assert (store / "concepts" / concept["id"] / "concept.safetensors").stat().st_mtime_ns == written
        assert [path.name for path in (store / "concepts").iterdir()] == [concept["id"]]
        assert not list((store / "incoming").iterdir())
        assert not list((store / "pictures").iterdir())


def test_a_damaged_concept_is_learned_again(tiny_model, tmp_path):
    store = tmp_path / "store"
    with running(store, tiny_model) as server:
        concept = ended(server.client, learn(server.client)["id"])
        before = bytes_of(server, concept["id"])
    with sqlite3.connect(store / "jobs.sqlite") as database:
        database.execute("UPDATE concepts SET status = 'training', ended = NULL")
    path = store / "concepts" / concept["id"] / "concept.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with running(store, tiny_model) as server:
        assert ended(server.client, concept["id"])["status"] == "done"
        assert bytes_of(server, concept["id"]) == before


def test_a_full_disk(tiny_model, tmp_path, expected):
    """507 while it is full, nothing kept of what was refused; what trains waits, and all goes on afterwards."""
    with running(tmp_path / "store", tiny_model) as server:
        concept = learn(server.client)
        server.limit_files(2000)
        wait_for(lambda: server.client.get("/readyz").status_code == 503, server)
        answer = server.client.post("/v1/concepts", files=photos(), data={"class_word": "teapot"})
        assert "the server's disk is full" in detail(answer, 507)
        assert answer.headers["retry-after"] == "30"
        answer = server.client.post("/v1/pictures", json={"pictures": [{"prompt": "a"}]})
        assert "the server's disk is full" in detail(answer, 507)
        assert str(tmp_path) not in detail(server.client.get("/readyz"), 503)
        assert server.client.get("/healthz").status_code == 200
        assert not list((tmp_path / "store" / "incoming").iterdir())
        server.limit_files(-1)
        assert ended(server.client, concept["id"])["status"] == "done"
        assert bytes_of(server, concept["id"]) == expected["teapot"]
        wait_for(lambda: server.client.get("/readyz").status_code == 200, server)
        assert ended(server.client, learn(server.client)["id"])["status"] == "done"
        assert not [line for line in server.said if "Traceback" in line]


def test_a_poisoned_job_fails_alone(tiny_model, tmp_path, expected):
    """Its loss is not finite; the other ends as it always does."""
    with running(tmp_path / "store", tiny_model, before=POISON) as server:
        good = learn(server.client)
        bad = learn(server.client, "owl")
        found = ended(server.client, bad["id"])
        assert found["status"] == "failed"
        assert found["error"].startswith("loss or gradient not finite after step 0; check the photos")
        assert ended(server.client, good["id"])["status"] == "done"
        assert bytes_of(server, good["id"]) == expected["teapot"]


def test_another_model(tiny_model, tmp_path):
    """Pictures of concepts that were learned on another model fail with a line; those of this one do not."""
    other = tiny.write(tmp_path / "other", seed=1)
    with running(tmp_path / "store", tiny_model) as server:
        concept = ended(server.client, learn(server.client)["id"])
    with running(tmp_path / "store", other) as server:
        asked = [{"prompt": "a teapot", "concepts": [{"id": concept["id"]}]}, {"prompt": "a teapot"}]
        answer = server.client.post("/v1/pictures", json={"pictures": asked, "wait": True}).json()
        assert [picture["status"] for picture in answer["pictures"]] == ["failed", "done"]
        error = answer["pictures"][0]["error"]
        assert error.startswith(f"concept {concept['id']}: learned in text encoder")
        assert str(tmp_path) not in error


def test_too_many_open_files(tiny_model, tmp_path):
    """Connections that nobody uses do not end the server: what trains and draws waits until there is room."""
    with running(tmp_path / "store", tiny_model) as server:
        host, port = server.address.removeprefix("http://").split(":")
        concept = learn(server.client, steps="60")
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (120, 120))
        connections = []
        for _ in range(150):
            with contextlib.suppress(OSError):
                connections.append(socket.create_connection((host, int(port)), 1))
        time.sleep(5)
        for connection in connections:
            connection.close()
        assert ended(server.client_of(), concept["id"])["status"] == "done"


def test_threads_leave_no_connection_open(tiny_model, tmp_path):
    """Each thread has one to the database, which ends with it."""
    with running(tmp_path / "store", tiny_model) as server:

        def ask() -> None:
            with server.client_of() as client:
                client.get("/v1/concepts")

        def ask_at_once() -> None:
            threads = [threading.Thread(target=ask) for _ in range(30)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def fewest_open(seconds: int) -> int:
            """The fewest files that were open: threads that have nothing to do end after ten seconds."""
            counts = []
            for _ in range(seconds):
                time.sleep(1)
                counts.append(psutil.Process(server.process.pid).num_fds())
            return min(counts)

        ask_at_once()
        before = fewest_open(11)
        ask_at_once()
        ask_at_once()
        assert fewest_open(20) <= before + 20  # it was 28 more each time, when they stayed
