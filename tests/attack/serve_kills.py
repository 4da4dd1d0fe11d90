"""Kills the service at random moments while clients ask, and starts it again, until every job has ended.

    python -m tests.attack.serve_kills --count=100

Each concept must end with the bytes of its uninterrupted run, each picture with its pixels, no job may run twice or be
lost once it was accepted, and of requests that were cut in the middle nothing may be left.
"""

import argparse
import random
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.service.servers import Running, photos

NAMES = ("teapot", "dog", "owl", "rocket")
TIMEOUT = 1800.0


@dataclass
class Reference:
    """What an uninterrupted server gives."""

    concepts: dict[str, bytes] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0


def post_concept(client: httpx.Client, name: str) -> str:
    answer = client.post(
        "/v1/concepts", files=photos(name), data={"class_word": name}, headers={"Idempotency-Key": f"concept {name}"}
    )
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def post_picture(client: httpx.Client, name: str, concept_id: str) -> str:
    asked = {"prompt": f"a {name} on the beach", "concepts": [{"id": concept_id}], "seed": 5}
    answer = client.post("/v1/pictures", json={"pictures": [asked]}, headers={"Idempotency-Key": f"picture {name}"})
    assert answer.status_code == 202, answer.text
    return answer.json()["pictures"][0]["id"]


def cut_request(address: str) -> None:
    """Sends half of an upload and leaves."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        head = f"POST /v1/concepts HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100000\r\n"
        kind = "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        part = '--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
        connection.sendall((head + kind + part).encode() + b"x" * 5000)


class Client(threading.Thread):
    """Somebody who asks for a concept and then for a picture of it, again and again until he has both."""

    def __init__(self, name: str, address: list[str], rng: random.Random):
        super().__init__(daemon=True)
        self.of, self._address, self._rng = name, address, rng
        self.ids: set[str] = set()
        self.concept = self.picture = b""
        self.problem = ""

    def run(self) -> None:
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until and not self.picture and not self.problem:
            try:
                with httpx.Client(base_url=self._address[0], timeout=10) as client:
                    self.ask(client)
            except (httpx.TransportError, OSError):  # it was killed
                time.sleep(self._rng.uniform(0.05, 0.5))
            except AssertionError as error:
                self.problem = str(error)
        if not self.picture and not self.problem:
            self.problem = "not done in time"

    def ask(self, client: httpx.Client) -> None:
        if self._rng.random() < 0.3:
            cut_request(self._address[0])
        concept_id = post_concept(client, self.of)
        self.ids.add(concept_id)
        while (status := client.get(f"/v1/concepts/{concept_id}").json())["status"] != "done":
            assert status["status"] != "failed", status
            time.sleep(0.1)
        self.concept = client.get(f"/v1/concepts/{concept_id}/concept.safetensors").content
        picture_id = post_picture(client, self.of, concept_id)
        while (status := client.get(f"/v1/pictures/{picture_id}").json())["status"] != "done":
            assert status["status"] != "failed", status
            time.sleep(0.1)
        self.picture = client.get(f"/v1/pictures/{picture_id}.png").content


def clients_of(address: list[str], rng: random.Random) -> list[Client]:
    clients = [Client(name, address, random.Random(rng.random())) for name in NAMES]
    for client in clients:
        client.start()
    return clients


def reference(folder: Path, model: str) -> Reference:
    """Runs without a kill, twice, so that the second time everything is compiled."""
    found = Reference()
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        server = Running(folder, model)
        clients = clients_of([server.address], random.Random(0))
        for client in clients:
            client.join()
            assert not client.problem, client.problem
            found.concepts[client.of], found.pictures[client.of] = client.concept, client.picture
        found.seconds = time.monotonic() - begun
        assert server.stop() == 0
    return found


def attack(folder: Path, model: str, expected: Reference, rng: random.Random) -> tuple[int, list[str]]:
    """Kills a server until its clients have what they asked for; returns the kills, and what is not as promised."""
    server = Running(folder, model)
    address, kills = [server.address], 0
    clients = clients_of(address, rng)
    while any(client.is_alive() for client in clients) and kills < 12:
        time.sleep(rng.uniform(0.02, 0.6) * expected.seconds)
        if all(not client.is_alive() for client in clients):
            break
        server.kill()
        kills += 1
        server = Running(folder, model)
        address[0] = server.address
    problems = []
    for client in clients:
        client.join()
        if client.problem:
            problems.append(f"{client.of}: {client.problem}")
        if len(client.ids) != 1:
            problems.append(f"{client.of}: {len(client.ids)} concepts of one key")
        if client.concept != expected.concepts[client.of]:
            problems.append(f"{client.of}: another concept")
        if client.picture != expected.pictures[client.of]:
            problems.append(f"{client.of}: another picture")
    for what in ("concepts", "pictures"):
        listed = server.client.get(f"/v1/{what}?limit=200").json()[what]
        if len(listed) != len(NAMES) or any(entry["status"] != "done" for entry in listed):
            problems.append(f"{len(listed)} {what}: {[entry['status'] for entry in listed]}")
    if status := server.stop():
        problems.append(f"exit status {status}: {''.join(server.said)[-400:]}")
    if left := list((folder / "incoming").iterdir()):
        problems.append(f"left: {left}")
    if "Traceback" in "".join(server.said):
        problems.append("".join(server.said)[-600:])
    return kills, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="kills of a running server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="", help="folder of a model; by default the mini model")
    given = parser.parse_args()
    rng, kills, runs, problems = random.Random(given.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = reference(folder / "whole", given.model)
        print(f"{expected.seconds:.1f} s uninterrupted", flush=True)
        while kills < given.count:
            more, found = attack(folder / f"store-{runs}", given.model, expected, rng)
            kills, runs, problems = kills + more, runs + 1, problems + found
            shutil.rmtree(folder / f"store-{runs - 1}")
            print(f"{kills} kills in {runs} runs, {len(problems)} problems", *found, sep="\n", flush=True)
    jobs = 2 * len(NAMES) * runs
    print(f"{kills} kills in {runs} runs, {jobs} jobs in all, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
