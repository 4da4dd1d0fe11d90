"""A service under load: clients that post concepts and pictures at once, beside `catversion batch` on the same ones."""

import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from catversion_jax.config import Config
from catversion_jax.utils import markdown
from catversion_jax.utils.errors import UserError, short

CONCEPTS = Path(__file__).parents[1] / "concepts"
BOUNDARY = "catversion-load"
LONGEST = 14_400.0
"""Seconds after which a load that has not ended is given up."""
SAMPLED = 0.2
"""Seconds between two looks at the server's memory and metrics."""
POLL = 1.0
"""Seconds between two rounds of a client's questions, as of the page."""


@dataclass(frozen=True)
class Load:
    """What is asked of the service."""

    concepts: int
    pictures: int
    clients: int


@dataclass
class Heard:
    """What the clients saw, all together."""

    status_seconds: list[float] = field(default_factory=list)
    picture_seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def shipped_photos(number: int) -> tuple[str, list[Path]]:
    """Returns the class word and the photos of a load's concept: the shipped ones, in turn."""
    names = sorted(path.name for path in CONCEPTS.iterdir() if (path / "train").is_dir())
    name = names[number % len(names)]
    return name, sorted((CONCEPTS / name / "train").glob("*.png"))


def multipart(fields: dict[str, str], files: Sequence[Path]) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    for path in files:
        parts.append(f'{head}"images"; filename="photo"\r\n\r\n'.encode() + path.read_bytes() + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


class Client(threading.Thread):
    """Somebody who posts his share of the concepts, watches them, and draws his share of the pictures with each."""

    def __init__(self, address: tuple[str, int], load: Load, index: int, heard: Heard):
        super().__init__(daemon=True)
        self._address, self._load, self._index, self._heard = address, load, index, heard
        self.waiting: set[str] = set()  # concepts
        self.drawing: set[str] = set()  # pictures

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        status, text = send(self._address, method, path, body, kind)
        if status == 429:
            time.sleep(1)
            return self.ask(method, path, body, kind)
        if status >= 300:
            raise UserError(f"{method} {path}: {status}: {text}")
        return json.loads(text)

    def run(self) -> None:
        try:
            self.post_concepts()
            until = time.monotonic() + LONGEST
            while (self.waiting or self.drawing) and time.monotonic() < until:
                self.look()
                time.sleep(POLL)
            self._heard.lost += [*self.waiting, *self.drawing]
        except (OSError, UserError, ValueError) as error:
            self._heard.lost.append(f"a client: {short(error)}")

    def post_concepts(self) -> None:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        for number in range(self._index, self._load.concepts, self._load.clients):
            word, files = shipped_photos(number)
            body = multipart({"class_word": word, "seed": str(number)}, files)
            self.waiting.add(self.ask("POST", "/v1/concepts", body, kind)["id"])

    def look(self) -> None:
        """Asks how everything is doing, one after the other; a concept that is done is drawn with."""
        for concept_id in list(self.waiting):
            begun = time.monotonic()
            found = self.ask("GET", f"/v1/concepts/{concept_id}")
            self._heard.status_seconds.append(time.monotonic() - begun)
            if found["status"] == "done":
                self.waiting.discard(concept_id)
                self.draw(found)
            elif found["status"] == "failed":
                raise UserError(f"concept {concept_id}: {found['error']}")
        for picture_id in list(self.drawing):
            found = self.ask("GET", f"/v1/pictures/{picture_id}")
            if found["status"] == "done":
                self.drawing.discard(picture_id)
            elif found["status"] == "failed":
                raise UserError(f"picture {picture_id}: {found['error']}")

    def draw(self, concept: dict[str, Any]) -> None:
        each = self._load.pictures // self._load.concepts
        picture = {"prompt": f"a photo of a {concept['class_word']} on the beach", "concepts": [{"id": concept["id"]}]}
        asked = [picture | {"seed": seed} for seed in range(each)]
        if asked:
            answer = self.ask("POST", "/v1/pictures", json.dumps({"pictures": asked}).encode())
            self.drawing |= {picture["id"] for picture in answer["pictures"]}


@contextmanager
def server_of(flags: Sequence[str], store: Path, load: Load) -> Iterator[tuple[subprocess.Popen, tuple[str, int]]]:
    """Starts a service, as an operator does, and gives it when it is ready; at the end it is stopped."""
    limits = [f"--most_concepts={load.concepts}", f"--most_pictures={max(1, load.pictures)}", "--most_requests=100000"]
    command = [sys.executable, "-m", "catversion_jax", "serve", *flags, f"--store={store}", "--port=0", *limits]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        match = re.search(r"http://([^:]+):(\d+)", line)
        if match is None:
            raise UserError("the service did not start; run `catversion serve` with the same config to see why")
        address = (match[1], int(match[2]))
        while not is_ready(address):
            if process.poll() is not None:
                raise UserError("the service ended; run `catversion serve` with the same config to see why")
            time.sleep(0.1)
        yield process, address
    finally:
        process.terminate()
        process.wait()


def is_ready(address: tuple[str, int]) -> bool:
    try:
        return send(address, "GET", "/readyz")[0] == 200
    except OSError:
        return False


def send(
    address: tuple[str, int], method: str, path: str, body: bytes | None = None, kind: str = ""
) -> tuple[int, str]:
    """Sends a request; returns the answer's status and its text."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": kind} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def metric(text: str, name: str) -> float:
    """Returns the value of one of the service's metrics."""
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def measure_service(flags: Sequence[str], load: Load, config: Config) -> dict[str, Any]:
    """Runs a load against a new service; returns the numbers."""
    heard, resident, samples = Heard(), [], []
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        with server_of(flags, Path(folder) / "store", load) as (process, address):
            ready = time.monotonic() - begun
            clients = [Client(address, load, i, heard) for i in range(load.clients)]
            begun = time.monotonic()
            for client in clients:
                client.start()
            server = psutil.Process(process.pid)
            while any(client.is_alive() for client in clients):
                resident.append(server.memory_info().rss / 2**20)
                samples.append(sampled(address))
                time.sleep(SAMPLED)
            seconds = time.monotonic() - begun
            samples.append(sampled(address))
            latencies = picture_latencies(address, load)
    half = resident[len(resident) // 2 :]
    return {
        "ready_seconds": round(ready, 1),
        "concepts": load.concepts,
        "pictures": load.pictures // load.concepts * load.concepts,
        "clients": load.clients,
        "lost": len(heard.lost),
        "problems": heard.lost[:5],
        "seconds": round(seconds, 1),
        "images_per_second": rate_of(samples, config),
        "worker_seconds": samples[-1],
        "status_ms": percentiles(heard.status_seconds, 1000),
        "picture_seconds": percentiles(latencies),
        "memory_mib": {"at_half": mean(half[: len(half) // 4 + 1]), "at_end": mean(half[-len(half) // 4 :])},
    }


def sampled(address: tuple[str, int]) -> dict[str, float]:
    """Returns the photos that training has taken, and the seconds that the worker has spent on each kind of work."""
    numbers, spent = send(address, "GET", "/metrics")[1], 'catversion_worker_seconds{{doing="{}"}}'
    busy = {doing: metric(numbers, spent.format(doing)) for doing in ("train", "draw", "rest")}
    return {"images": metric(numbers, "catversion_images")} | busy


def rate_of(samples: Sequence[dict[str, float]], config: Config) -> float:
    """Returns the photos a second of the time that was not drawn, after the first slots, as for `catversion batch`."""
    first = config.batch.slots * config.train.steps * config.train.batch_size
    begun, last = next((found for found in samples if found["images"] >= first), samples[0]), samples[-1]
    seconds = sum(last[doing] - begun[doing] for doing in ("train", "rest"))
    return round((last["images"] - begun["images"]) / max(1e-9, seconds), 2)


def picture_latencies(address: tuple[str, int], load: Load) -> list[float]:
    """Returns the seconds from when each picture was asked for to when it was drawn."""
    found: list[float] = []
    after = ""
    while load.pictures:
        page = json.loads(send(address, "GET", f"/v1/pictures?limit=200{after}")[1])
        found += [picture["ended"] - picture["created"] for picture in page["pictures"] if picture["ended"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    return found


def mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)))


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Returns the median and the 95th percentile."""
    if not values:
        return {}
    return {name: round(float(np.percentile(values, at)) * scale, 2) for name, at in (("p50", 50), ("p95", 95))}


def measure_batch(flags: Sequence[str], load: Load, config: Config) -> dict[str, Any]:
    """Runs `catversion batch` on the same concepts; its first slots, which are compiled for, are left out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = []
        for number in range(load.concepts):
            word, files = shipped_photos(number)
            lines.append({"id": f"c{number}", "dir": str(files[0].parent), "class_word": word, "seed": number})
        manifest = folder / "manifest.jsonl"
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = [*flags, f"--manifest={manifest}", f"--config.run_dir={folder / 'out'}"]
        command = [sys.executable, "-m", "catversion_jax", "batch", *run, "--config.batch.previews=0"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"catversion batch: {done.stderr.strip().splitlines()[-1]}")
        times = sorted(path.stat().st_mtime for path in (folder / "out").glob("*/concept.safetensors"))
    first = min(config.batch.slots, load.concepts) - 1
    images = (load.concepts - first - 1) * config.train.steps * config.train.batch_size
    return {"images_per_second": round(images / max(1e-9, times[-1] - times[first]), 2)}


def load_table(facts: dict[str, Any]) -> str:
    """Returns the numbers as a table of Markdown."""
    service, batch = facts["service"], facts["batch"]
    rows = [
        ["ready after, seconds", service["ready_seconds"]],
        ["concepts, pictures, clients", f"{service['concepts']}, {service['pictures']}, {service['clients']}"],
        ["lost", service["lost"]],
        ["seconds", service["seconds"]],
        ["images/s while the device does not draw", service["images_per_second"]],
        ["images/s of catversion batch", batch["images_per_second"]],
        ["status requests, ms (p50, p95)", pair(service["status_ms"])],
        ["pictures, seconds (p50, p95)", pair(service["picture_seconds"])],
        ["resident MiB, at half and at the end", pair(service["memory_mib"])],
    ]
    return markdown.table(["", "measured"], [[name, str(value)] for name, value in rows])


def pair(values: dict[str, float]) -> str:
    return ", ".join(f"{value:g}" for value in values.values()) or "none"
