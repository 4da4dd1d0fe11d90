"""Nobody gets in: tokens, whose things are whose, limits, and what a browser could be made to do."""

import io
import threading

import httpx
import pytest
from PIL import Image

from catversion_jax.service.guard import Buckets
from catversion_jax.service.tokens import add_token, read_tokens
from catversion_jax.utils.errors import UserError
from tests.attack.serve_fuzz import fuzz
from tests.commands import catversion
from tests.service.servers import Running, detail, ended, learn, photos, running, wait_for

LIMITS = (
    "--most_upload_mib=1", "--most_photos=8", "--most_megapixels=1", "--most_concepts=2", "--most_pictures=3",
    "--most_requests=1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    found = {name: catversion("token", name, f"--tokens={path}").stdout.strip() for name in ("anna", "ben")}
    return path, found


@pytest.fixture(scope="module")
def guarded(tiny_model, tmp_path_factory, tokens):
    store = tmp_path_factory.mktemp("guarded") / "store"
    with running(store, tiny_model, f"--tokens={tokens[0]}", "--host=0.0.0.0", *LIMITS) as server:
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        yield server


@pytest.fixture(scope="module")
def anna(guarded, tokens):
    return guarded.client_of(tokens[1]["anna"])


@pytest.fixture(scope="module")
def ben(guarded, tokens):
    return guarded.client_of(tokens[1]["ben"])


@pytest.fixture(scope="module")
def annas(guarded, anna):
    """A concept and a picture of Anna's."""
    concept = ended(anna, learn(anna)["id"])
    body = {"pictures": [{"prompt": "a teapot", "concepts": [{"id": concept["id"]}]}], "wait": True}
    (picture,) = anna.post("/v1/pictures", json=body).json()["pictures"]
    return concept, picture


def test_tokens_are_hashed(tokens, guarded):
    path, found = tokens
    assert path.stat().st_mode & 0o777 == 0o600
    for token in found.values():
        assert len(token) > 40
        for file in (path, *(file for file in guarded.store.rglob("*") if file.is_file())):
            assert token.encode() not in file.read_bytes()
    assert set(read_tokens(path).values()) == {"anna", "ben"}


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", "Basic YW5uYTp4", "bearer cv_" + "a" * 43])
def test_without_a_token(guarded, header):
    """Nothing is read of the request: neither a photo nor a job."""
    client = httpx.Client(base_url=guarded.address, headers={} if header is None else {"Authorization": header})
    for method, path in (
        ("GET", "/v1/concepts"), ("POST", "/v1/concepts"), ("POST", "/v1/pictures"), ("GET", "/v1/service"),
        ("GET", "/metrics"), ("POST", "/v1/checks"), ("DELETE", f"/v1/concepts/{'0' * 24}"),
        ("GET", "/v1/webhook_secret"),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert "no token of this service" in detail(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/healthz").status_code == 200
    assert client.get("/").status_code == 200


def test_each_sees_its_own_alone(guarded, anna, ben, annas):
    concept, picture = annas
    for path in (
        f"/v1/concepts/{concept['id']}", f"/v1/concepts/{concept['id']}/events", concept["concept"],
        f"/v1/concepts/{concept['id']}/export.zip", *concept["photos"],
        *(preview["url"] for preview in concept["previews"]), f"/v1/pictures/{picture['id']}", picture["url"],
    ):  # fmt: skip
        assert anna.get(path).status_code == 200, path
        assert "not found" in detail(ben.get(path), 404), path
    for path in (f"/v1/concepts/{concept['id']}", f"/v1/pictures/{picture['id']}"):
        assert "not found" in detail(ben.delete(path), 404)
        assert anna.get(path).status_code == 200
    body = {"pictures": [{"prompt": "a teapot", "concepts": [{"id": concept["id"]}]}]}
    assert detail(ben.post("/v1/pictures", json=body), 404) == f"concept {concept['id']}: not found"
    assert ben.get("/v1/concepts").json() == {"concepts": [], "next": None}
    assert ben.get("/v1/pictures").json() == {"pictures": [], "next": None}
    assert ben.get("/v1/webhook_secret").json() != anna.get("/v1/webhook_secret").json()


def test_keys_are_each_ones_own(guarded, anna, ben):
    key = {"Idempotency-Key": "same"}
    first = learn(anna, "owl", key, steps="2")
    second = learn(ben, "owl", key, steps="2")
    assert first["id"] != second["id"]
    for client, concept in ((anna, first), (ben, second)):
        assert ended(client, concept["id"])["status"] == "done"


def test_a_request_that_is_too_large(guarded, anna):
    """Whether it says so or not; and nothing of it is kept."""
    data = b"x" * (2 * 2**20)
    answer = anna.post("/v1/concepts", files={"images": ("a.png", data)}, data={"class_word": "a"})
    assert detail(answer, 413) == "the request is too large; expected at most 1 MiB"
    body = b'{"pictures":[' + b"[]," * 2**19 + b"[]]}"
    answer = anna.post("/v1/pictures", content=body, headers={"Content-Type": "application/json"})
    assert detail(answer, 413) == "the request is too large; expected at most 1 MiB"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    parts = (b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n', *[b"y" * 2**18] * 8)
    assert detail(anna.post("/v1/concepts", content=iter(parts), headers=headers), 413)
    assert not list((guarded.store / "incoming").iterdir())


def test_photos_within_limits(guarded, anna):
    file = io.BytesIO()
    Image.new("1", (2000, 1000)).save(file, "PNG")
    answer = anna.post("/v1/concepts", files={"images": ("a.png", file.getvalue())}, data={"class_word": "a"})
    assert detail(answer, 422) == "photos/000: 2 megapixels; expected at most 1; make it smaller"
    answer = anna.post("/v1/concepts", files=photos() * 2, data={"class_word": "a"})
    assert "10 photos; expected at most 8" in detail(answer, 422)


def test_the_queue_of_a_token(guarded, anna, ben):
    """Anna's is full; Ben's is not."""
    waiting = [learn(anna, steps="2000") for _ in range(2)]
    answer = anna.post("/v1/concepts", files=photos(), data={"class_word": "teapot"})
    assert "2 concepts of this token wait or train already" in detail(answer, 429)
    assert int(answer.headers["retry-after"]) > 0
    assert not list((guarded.store / "incoming").iterdir())
    bens = learn(ben, steps="1")
    for concept in waiting:
        assert anna.delete(f"/v1/concepts/{concept['id']}").status_code == 204
    assert ended(ben, bens["id"], previews=False)["status"] == "done"
    answer = anna.post("/v1/pictures", json={"pictures": [{"prompt": "a"}] * 4})
    assert "more than 3 pictures of this token would wait" in detail(answer, 429)


def test_malformed_requests(guarded, tokens, annas):
    """To every route, made from its description; `make fuzz` sends a thousand."""
    concept, picture = annas
    statuses = fuzz(guarded, tokens[1]["ben"], [concept["id"], picture["id"]], 100)
    assert statuses[422] > 10
    assert not [line for line in guarded.said if "Traceback" in line]


def test_the_rate(tiny_model, tmp_path):
    with running(tmp_path / "store", tiny_model, "--most_requests=5") as server:
        answers = [server.client.get("/v1/service") for _ in range(40)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert detail(refused[0], 429) == "more than 5 requests a second; wait a second"
        assert refused[0].headers["retry-after"] == "1"
        wait_for(lambda: server.client.get("/v1/service").status_code == 200)


def test_buckets_are_bounded():
    buckets = Buckets(3)
    assert [buckets.take("a") for _ in range(5)] == [True] * 3 + [False] * 2
    assert all(buckets.take(str(i)) for i in range(20_000))
    assert len(buckets._left) <= 10_000


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Host": "evil.example"}, "Host: evil.example"),
        ({"Host": "evil.example:8000"}, "for this machine alone"),
        ({"Origin": "https://evil.example"}, "another site's page"),
        ({"Origin": "null"}, "another site's page"),
        ({"Sec-Fetch-Site": "cross-site"}, "another site's page"),
        ({"Sec-Fetch-Site": "same-site"}, "another site's page"),
    ],
)
def test_pages_of_other_sites(server: Running, headers, expected):
    """Where there are no tokens, a page that the person happens to open must not be able to use the server."""
    answer = server.client.post("/v1/concepts", files=photos(), data={"class_word": "a"}, headers=headers)
    assert expected in detail(answer, 403)
    assert "access-control-allow-origin" not in answer.headers


def test_the_own_page(server: Running):
    headers = {"Origin": server.address, "Sec-Fetch-Site": "same-origin"}
    assert server.client.post("/v1/pictures", json={"pictures": [{"prompt": "a"}]}, headers=headers).status_code == 202


def test_names_of_clients_are_nobodys(server: Running, teapot):
    """No name that a client gave is the name of a file."""
    names = {path.name for path in (server.store / "concepts" / teapot["id"]).rglob("*")}
    assert {name for name in names if "00.png" in name and not name.startswith("000")} == set()
    assert {"000.png", "concept.safetensors"} <= names


def test_what_comes_back_is_text(server: Running):
    """A page's escaping is tested in the browser; the API's answers are never HTML."""
    answer = server.client.get("/v1/concepts/<script>alert(1)</script>")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.client.get("/nowhere<script>").headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("text", ["", "anna", "anna:xyz", "an na:" + "0" * 64])
def test_files_that_are_no_tokens(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(UserError, match="expected lines NAME:SHA256"):
        read_tokens(path)


def test_names_of_tokens(tmp_path):
    with pytest.raises(UserError, match="no name for a token"):
        add_token(tmp_path / "tokens", "a:b")
    first, second = add_token(tmp_path / "tokens", "anna"), add_token(tmp_path / "tokens", "anna")
    assert first != second
    assert len(read_tokens(tmp_path / "tokens")) == 2


def test_two_at_once_with_one_key(server: Running):
    """One of them is accepted, and both get its id."""
    answers = []
    key = {"Idempotency-Key": "twice"}

    def post() -> None:
        answers.append(learn(server.client_of(), "owl", key, steps="1"))

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["id"] for answer in answers}) == 1
    assert len(answers) == 4
    assert ended(server.client, answers[0]["id"])["status"] == "done"
