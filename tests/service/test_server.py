"""A server's start and end, its health, its numbers and its description."""

import os
import re
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.commands import ENVIRONMENT, ROOT, catversion, error_of
from tests.service.servers import Running, ended, learn, wait_for

EXTRA = "error: serve needs fastapi; pip install 'catversion-jax[serve]'"


def test_health(server: Running, teapot):
    assert server.client.get("/healthz").text == "ok"
    assert server.client.get("/readyz").text == "ready"


def test_metrics(server: Running, teapot):
    families = {family.name: family for family in text_string_to_metric_families(server.client.get("/metrics").text)}
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["catversion_ended_total", "concepts", "done"] >= 1
    assert values["catversion_concepts_seconds_count",] >= 1
    assert values["catversion_concepts_per_hour",] >= 1
    assert values["catversion_slots",] == 2
    assert values["catversion_queue", "concepts", "waiting"] >= 0
    assert {"catversion_slots_busy", "catversion_images_per_second", "catversion_request_seconds"} <= set(families)
    assert any(key[0] == "catversion_request_seconds_count" and "/v1/concepts/{concept_id}" in key for key in values)


def test_the_description(server: Running):
    """Whole, and with nothing from elsewhere."""
    description = server.client.get("/openapi.json").json()
    assert {"/v1/concepts", "/v1/concepts/{concept_id}/events", "/v1/pictures", "/readyz"} <= set(description["paths"])
    assert all(
        operation.get("description") or operation.get("summary")
        for of_path in description["paths"].values()
        for operation in of_path.values()
    )
    page = server.client.get("/docs")
    assert not re.findall(r"(?:src|href)=\"(?!/)", page.text)
    for path in re.findall(r"(?:src|href)=\"(/[^\"]+)", page.text):
        assert server.client.get(path).status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_the_page_asks_nobody_else(server: Running):
    for path in ("/", "/page.js", "/page.css"):
        answer = server.client.get(path)
        assert answer.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", answer.text), path
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "--store: missing; expected a folder"),
        (("--host=0.0.0.0",), "--host=0.0.0.0: for others than this machine --tokens is needed, which says who"),
        (("--most_photos=0",), "--most_photos=0: expected"),
        (("--sizes=big",), "--sizes=big: expected WIDTHxHEIGHT"),
        (("--tokens=/nowhere",), "/nowhere: cannot be read"),
    ],
)
def test_mistakes_of_the_operator(tmp_path, flags, expected):
    store = [] if not flags else [f"--store={tmp_path / 'store'}"]
    assert expected in error_of("serve", *store, *flags)


def test_a_port_that_is_taken(server: Running, tiny_model, tmp_path):
    port = server.address.rpartition(":")[2]
    arguments = ("serve", f"--store={tmp_path}", f"--config.model.path={tiny_model}", f"--port={port}")
    said = catversion(*arguments, status=1, here=False).stderr
    assert f"http://127.0.0.1:{port}: cannot listen there; choose another --port or --host" in said


def test_without_the_extra(tmp_path):
    """Everything else works; serve says in one line what to install."""
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('No module named fastapi', name='fastapi')")
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for arguments, status, expected in (
        (
            ["serve", f"--store={tmp_path / 'store'}"],
            1,
            EXTRA,
        ),
        (["status", str(tmp_path)], None, ""),
    ):
        run = [sys.executable, "-m", "catversion_jax", *arguments]
        done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
        assert status is None or done.returncode == status


def test_sigterm_saves_and_ends(tiny_model, tmp_path):
    """No new jobs, the slots saved, exit 0; the next server goes on where this one was."""
    store = tmp_path / "store"
    server = Running(store, tiny_model, checkpoint__every=10**6).ready()
    concept = learn(server.client, steps="60")
    wait_for(lambda: server.client.get(f"/v1/concepts/{concept['id']}").json()["step"] >= 20)
    assert server.stop() == 0, server.said
    assert not [line for line in server.said if "Traceback" in line]
    (saved,) = (store / "checkpoints").iterdir()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        (step,) = reader.restore(saved / "state")["step"]
    server = Running(store, tiny_model, checkpoint__every=10**6)
    found = ended(server.client, concept["id"])
    assert found["status"] == "done"
    # Its first step was that after the saved one.
    assert found["losses"][0][0] == step + 1 >= 20
    assert server.stop() == 0


def test_ui_opens_the_page(tiny_model, tmp_path):
    """In the browser of the person, which here only writes down what it is told to open."""
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    run = [sys.executable, "-m", "catversion_jax", "ui", f"--store={tmp_path / 'store'}", "--port=0"]
    process = subprocess.Popen(
        [*run, f"--config.model.path={tiny_model}"],
        env=ENVIRONMENT | {"BROWSER": str(browser)}, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        while not opened.exists():
            assert process.poll() is None
        assert opened.read_text().strip() == address
    finally:
        process.kill()
        process.wait()
