"""Requests to other servers: photos that are fetched, and webhooks; real servers with certificates, on the loopback."""

import base64
import hashlib
import hmac
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from catversion_jax.service import outbound
from catversion_jax.service.outbound import address_of, checked_url, checked_webhook
from catversion_jax.utils.errors import UserError
from tests.service.servers import CONCEPTS, Running, detail, ended, learn, photos, running, wait_for


class Elsewhere(BaseHTTPRequestHandler):
    """Photos, redirects, and a webhook that refuses the first messages."""

    refusals = 2
    heard: list[tuple[dict, bytes]] = []
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/inside":
            self.answer(302, b"", Location="https://169.254.169.254/latest/meta-data/")
        elif self.path == "/other":
            self.answer(302, b"", Location="https://localhost:1/a.png")
        elif self.path == "/plain":
            self.answer(302, b"", Location="http://127.0.0.1/a.png")
        elif self.path == "/loop":
            self.answer(302, b"", Location=f"https://127.0.0.1:{self.server.server_port}/loop")
        elif self.path == "/moved":
            self.answer(301, b"", Location=f"https://127.0.0.1:{self.server.server_port}/00.png")
        elif self.path == "/page":
            self.answer(200, b"<html>")
        else:
            file = CONCEPTS / "teapot" / "train" / self.path.lstrip("/")
            self.answer(*((200, file.read_bytes()) if file.is_file() else (404, b"")))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).heard.append((dict(self.headers), body))
        self.answer(503 if len(self.heard) <= self.refusals else 204, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """The host of a server, and the environment that trusts it."""
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("certificates")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(folder / "authority.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", {"SSL_CERT_FILE": str(folder / "authority.pem")}
    server.shutdown()


@pytest.fixture(scope="module")
def fetching(tiny_model, tmp_path_factory, elsewhere) -> Iterator[Running]:
    host, environment = elsewhere
    store = tmp_path_factory.mktemp("fetching") / "store"
    with running(store, tiny_model, f"--url_hosts={host}", environment=environment) as server:
        yield server


def by_urls(server: Running, *urls: str, **fields) -> dict:
    answer = server.client.post("/v1/concepts", data={"class_word": "teapot", "steps": "2", "urls": urls, **fields})
    assert answer.status_code == 202, answer.text
    return ended(server.client, answer.json()["id"])


def test_photos_from_a_list(fetching, elsewhere):
    host, _ = elsewhere
    found = by_urls(fetching, f"https://{host}/00.png", f"https://{host}/moved", f"https://{host}/01.png")
    assert (found["status"], len(found["photos"])) == ("done", 3)
    uploaded = learn(fetching.client, steps="2")
    assert ended(fetching.client, uploaded["id"])["status"] == "done"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/inside", "169.254.169.254 is not on this service's list"),
        ("/other", "localhost is not on this service's list"),
        ("/plain", "no https:// URL"),
        ("/loop", "more than 3 redirects"),
        ("/missing.png", "its server answers 404"),
        ("/page", "not a JPEG, PNG, WEBP, HEIC or AVIF image"),
    ],
)
def test_what_is_not_fetched(fetching, elsewhere, path, expected):
    """Redirects lead to the operator's hosts alone; the concept fails by itself, and nothing is left."""
    host, _ = elsewhere
    found = by_urls(fetching, f"https://{host}/00.png", f"https://{host}{path}")
    assert found["status"] == "failed"
    assert expected in found["error"]
    assert str(fetching.store) not in found["error"]
    assert not list((fetching.store / "incoming").iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "http://photos.example/a", "https://user@photos.example/a", "https://other.example/a", "https://photos.example:444/a",
        "file:///etc/passwd", "https:///a", "https://[::1]/a", "https://photos.example:x/a", "https://photos.example/\u00e9",
        "https://photos.example.evil.example/a", "https://127.0.0.1/a", "gopher://photos.example/a", "",
    ],
)  # fmt: skip
def test_urls_that_are_none_of_the_list(url):
    with pytest.raises(UserError):
        checked_url(url, ["photos.example"])


def test_urls_of_the_list():
    for url in ("https://photos.example/a?b=c", "https://PHOTOS.example:443/a"):
        assert checked_url(url, ["photos.example"]).hostname == "photos.example"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fd00::1", "100.64.0.1", "0.0.0.0",
        "::ffff:10.0.0.1",
    ],
)  # fmt: skip
def test_names_that_lead_inside(monkeypatch, address):
    """A name may be made to lead anywhere; only addresses that the operator wrote down himself may be his own."""
    family = outbound.socket.AF_INET6 if ":" in address else outbound.socket.AF_INET
    found = [(family, None, 6, "", (address, 443))]
    monkeypatch.setattr(outbound.socket, "getaddrinfo", lambda *args, **how: found)
    with pytest.raises(UserError, match="no public address"):
        address_of("photos.example", 443, listed=True)
    with pytest.raises(UserError, match="no public address"):
        address_of(address, 443, listed=False)
    assert address_of(address, 443, listed=True) == (address, 443)


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1/hook", "https://[::1]/", "http://hooks.example", "https://10.0.0.1/"]
)
def test_webhooks_that_are_none(url):
    with pytest.raises(UserError):
        checked_webhook(url, [])
    assert checked_webhook("https://hooks.example/a", []).hostname == "hooks.example"


def test_a_webhook(fetching, elsewhere):
    """Signed, and again with a delay until it is heard."""
    host, _ = elsewhere
    concept = learn(fetching.client, steps="2", webhook_url=f"https://{host}/hook")
    assert ended(fetching.client, concept["id"])["status"] == "done"
    wait_for(lambda: len(Elsewhere.heard) > Elsewhere.refusals, fetching)
    secret = fetching.client.get("/v1/webhook_secret").json()["secret"]
    key = base64.b64decode(secret.removeprefix("whsec_"))
    ids = set()
    for headers, body in Elsewhere.heard:
        headers = {name.lower(): value for name, value in headers.items()}
        ids.add(headers["webhook-id"])
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        assert json.loads(body) == {
            "type": "concept.done",
            "data": {"id": concept["id"], "status": "done", "error": None},
        }
    assert len(ids) == 1  # by which a receiver knows one that it has had


def test_hosts_of_webhooks(fetching):
    answer = fetching.client.post(
        "/v1/concepts", files=photos(), data={"class_word": "a", "webhook_url": "https://127.0.0.1:9/hook"}
    )
    assert "an address; expected a server's name" in detail(answer, 422)


def test_servers_that_never_answer(tiny_model, tmp_path, elsewhere):
    """They hold up neither other people's concepts nor the end of the server."""
    silent = socket.create_server(("127.0.0.1", 0))
    host = f"127.0.0.1:{silent.getsockname()[1]}"
    flags = (f"--url_hosts={host},{elsewhere[0]}",)
    with running(tmp_path / "store", tiny_model, *flags, environment=elsewhere[1]) as server:
        urls = {"class_word": "teapot", "urls": [f"https://{host}/a.png"]}
        waiting = [server.client.post("/v1/concepts", data=urls).json()["id"] for _ in range(3)]
        quick = learn(server.client, steps="1", webhook_url=f"https://{host}/hook")
        assert ended(server.client, quick["id"])["status"] == "done"
        assert {server.client.get(f"/v1/concepts/{i}").json()["status"] for i in waiting} == {"preparing"}
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 8  # a connection alone waits for longer
    silent.close()
