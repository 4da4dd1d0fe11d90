"""A service as an operator starts it: `catversion serve` in a process of its own, on a free port of the loopback."""

import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.commands import ENVIRONMENT, ROOT, command

CONCEPTS = ROOT / "catversion_jax" / "concepts"
PATIENCE = 90.0
STEPS = 6
CONFIG = {
    "adapter.length": 2, "train.steps": STEPS, "train.steps_per_dispatch": 1, "train.batch_size": 2,
    "checkpoint.every": 2, "batch.slots": 2, "batch.previews": 2, "sample.every": 4, "sample.steps": 2,
    "sample.prompts": "'a photo of {concept} on the beach','a blue {class_word}'",
}  # fmt: skip


def config_flags(model: Path, **changes: object) -> list[str]:
    values = CONFIG | {"model.path": model} | {key.replace("__", "."): value for key, value in changes.items()}
    return ["--config=configs/mini.py", *(f"--config.{key}={value}" for key, value in values.items())]


class Running:
    """A server that runs."""

    def __init__(
        self,
        store: Path,
        model: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        before: str = "",
        **changes,
    ):
        """`before` is run in the server's process first; `changes` are keys of the config, with __ for dots."""
        self.store = store
        arguments = ["serve", *config_flags(model, **changes), f"--store={store}", "--port=0", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\nfrom catversion_jax.cli.main import run; run()", *arguments]
            if before
            else command(*arguments),
            cwd=ROOT,
            env=ENVIRONMENT | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, (line, "".join(self.said))
        self.address = found[0]
        self.client = self.client_of()

    def client_of(self, token: str | None = None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=120)

    def ready(self) -> "Running":
        wait_for(lambda: self.client.get("/readyz").status_code == 200, self)
        return self

    def limit_files(self, size: int) -> None:
        """No file may grow beyond a size from now on, as on a full disk; -1: any may again."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Sends SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def running(store: Path, model: Path, *flags: str, **how: Any) -> Iterator[Running]:
    server = Running(store, model, *flags, **how)
    try:
        yield server.ready()
    finally:
        server.kill()


def wait_for(holds: Callable[[], object], server: Running | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, "".join(server.said if server else [])
        assert server is None or server.process.poll() is None, "".join(server.said)
        time.sleep(0.05)


def photos(name: str = "teapot", count: int = 5) -> list[tuple[str, tuple[str, bytes]]]:
    files = sorted((CONCEPTS / name / "train").glob("*.png"))[:count]
    return [("images", (f"../../{path.name}", path.read_bytes())) for path in files]


def learn(client: httpx.Client, name: str = "teapot", headers: dict[str, str] | None = None, **fields) -> dict:
    """Posts a concept; its answer."""
    answer = client.post("/v1/concepts", files=photos(name), data={"class_word": name} | fields, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def ended(client: httpx.Client, concept_id: str, previews: bool = True) -> dict:
    """A concept's answer when it has ended and, with `previews`, its last ones are there."""
    found: dict = {}

    def has_ended() -> bool:
        found.update(client.get(f"/v1/concepts/{concept_id}").json())
        if found["status"] == "done" and previews:
            return sum(preview["step"] == found["step"] for preview in found["previews"]) == 2
        return found["status"] in ("done", "failed", "cancelled")

    wait_for(has_ended)
    return found


def detail(answer: httpx.Response, status: int) -> str:
    """The line of a problem, which has to be one as RFC 9457 has it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem.keys() == {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert "\n" not in problem["detail"]
    return problem["detail"]
