"""Concepts on a hub: pushed to and taken from a small server on the loopback, by the real client."""

import base64
import http.server
import json
import re
import threading

import numpy as np
import pytest

from catversion_jax.data import concept_sets
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.errors import UserError
from tests import tiny
from tests.commands import catversion, error_of

COMMIT = "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that pushing and fetching files take; `files` are those of all repositories."""

    files: dict[str, bytes] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            name = json.loads(body)
            return self.answer({"url": f"{self.hub}/{name.get('organization', 'you')}/{name['name']}"})
        repo = re.match(r"/api/models/([^/]+/[^/]+)/", self.path)[1]
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.answer({"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[f"{repo}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub}/{repo}/commit/{COMMIT}"})

    def do_GET(self):
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*|/tree/.*)?(\?.*)?", self.path):
            names = [name.removeprefix(f"{match[1]}/") for name in self.files if name.startswith(f"{match[1]}/")]
            if not names:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if "/tree/" in self.path:
                return self.answer([{"type": "file", "path": n, "size": 1, "oid": COMMIT} for n in names])
            siblings = [{"rfilename": name} for name in names]
            return self.answer({"id": match[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", self.path)
        data = self.files.get(f"{match[1]}/{match[2]}") if match else None
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        self.send_response(200)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(data))}"', "Content-Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    @property
    def hub(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, value, status: int = 200, headers=None):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.files = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def concept(model) -> Concept:
    prefix = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 16)).astype(np.float32)
    return tiny.concept(prefix, "", model)


def test_a_concept_comes_back(hub, tmp_path):
    mine = concept(tmp_path / "home" / "me" / "tiny")
    (tmp_path / "preview.png").write_bytes(b"\x89PNG")
    assert mine.push_to_hub("you/teapot", tmp_path / "preview.png") == f"{hub}/you/teapot"
    assert sorted(Hub.files) == [f"you/teapot/{name}" for name in ("README.md", "concept.safetensors", "preview.png")]
    again = Concept.from_pretrained("you/teapot")
    np.testing.assert_array_equal(again.learned["prefix"], mine.learned["prefix"])
    assert again.model_path == "tiny"
    card = Hub.files["you/teapot/README.md"].decode()
    assert "**teapot**" in card
    assert "![Images of it](preview.png)" in card
    assert "--embedding=you/teapot" in card
    for data in Hub.files.values():
        assert str(tmp_path).encode() not in data, "no path of this machine"


def test_commands(hub, tmp_path, tiny_model):
    teapot = concept_sets.SHIPPED / "teapot" / "train"
    values = {"run_dir": tmp_path / "run", "data.dir": teapot, "concept.class_word": "teapot", "model.path": tiny_model}
    values |= {"train.steps": 2, "sample.every": 0, "sample.steps": 2}
    flags = ["--config=mini", *(f"--config.{key}={value}" for key, value in values.items())]
    done = catversion("train", *flags, "--push_to_hub=you/teapot", here=True)
    assert f"shared:   {hub}/you/teapot" in done.stdout
    given = ["--prompt=a teapot", "--num=1", f"--model={tiny_model}"]
    catversion("generate", "--embedding=you/teapot", *given, f"--out={tmp_path / 'a'}")
    catversion("generate", f"--embedding={tmp_path / 'run'}", *given, f"--out={tmp_path / 'b'}")
    (first,), (second,) = (list((tmp_path / name).glob("a-teapot_*_0.png")) for name in "ab")
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_mistakes(hub, monkeypatch, tmp_path):
    assert "you/nothing" in error_of("generate", "--embedding=you/nothing", "--prompt=a teapot")
    Hub.files["you/other/config.json"] = b"{}"
    with pytest.raises(UserError, match=r"you/other: no concept\.safetensors there"):
        Concept.from_pretrained("you/other")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"you/teapot: not uploaded to .*; log in"):
        concept("").push_to_hub("you/teapot")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    line = error_of("generate", f"--embedding={tmp_path / 'runs' / 'mug'}", "--prompt=a teapot")
    assert "not found; expected a learned concept" in line
