"""Pictures over HTTP: those of different concepts in one batch, each as `catversion generate` draws it."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from catversion_jax.sampling.picture_record import read_picture
from tests.commands import catversion
from tests.service.servers import Running, detail, ended, learn, running, wait_for


def drawn(server: Running, *pictures: dict, status: int = 200, **headers) -> list[dict]:
    answer = server.client.post("/v1/pictures", json={"pictures": pictures, "wait": True}, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()["pictures"]


def pixels(picture: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["png"]))))


@pytest.fixture(scope="module")
def dog(server: Running) -> dict:
    return ended(server.client, learn(server.client, "dog")["id"])


def test_a_picture_equals_that_of_generate(server: Running, teapot, tiny_model, tmp_path):
    """Its PNG says how it was made, and `generate --like` makes it again from the downloaded concept."""
    asked = {"prompt": "a photo of a teapot", "concepts": [{"id": teapot["id"], "strength": 1.5}], "seed": 3}
    (picture,) = drawn(server, asked)
    assert picture["status"] == "done"
    path = tmp_path / "theirs.png"
    path.write_bytes(server.client.get(picture["url"]).content)
    record = read_picture(path)
    assert (record.prompt, record.seed, record.concepts[0].strength) == ("a photo of a teapot", 3, 1.5)
    concept = tmp_path / "concept.safetensors"
    concept.write_bytes(server.client.get(teapot["concept"]).content)
    out = tmp_path / "out"
    how = (f"--like={path}", f"--embedding={concept}", f"--model={tiny_model}", f"--out={out}")
    catversion("generate", "--num=1", *how)
    (ours,) = out.glob("*_3.png")
    np.testing.assert_array_equal(np.asarray(Image.open(ours)), pixels(picture))


def test_concepts_share_a_batch(server: Running, teapot, dog):
    """And each is the same as when it is drawn alone, but for the last bits."""
    asked = [
        {"prompt": "a photo of a teapot", "concepts": [{"id": teapot["id"]}], "seed": 1},
        {"prompt": "a photo of a dog", "concepts": [{"id": dog["id"]}], "seed": 2},
        {"prompt": "a photo of a dog", "seed": 2},
        {"prompt": "a dog and a teapot", "concepts": [{"id": dog["id"]}, {"id": teapot["id"]}]},
    ]
    together = drawn(server, *asked)
    for picture, alone in zip(together, asked, strict=True):
        (other,) = drawn(server, alone)
        assert np.abs(pixels(picture).astype(int) - pixels(other).astype(int)).max() <= 1
    assert not np.array_equal(pixels(together[1]), pixels(together[2]))


def test_one_as_a_png(server: Running, teapot):
    body = {"pictures": [{"prompt": "a teapot", "concepts": [{"id": teapot["id"]}]}], "wait": True}
    answer = server.client.post("/v1/pictures", json=body, headers={"Accept": "image/png"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert json.loads(Image.open(io.BytesIO(answer.content)).info["catversion"])["prompt"] == "a teapot"


def test_ids_at_once(server: Running, teapot):
    body = {"pictures": [{"prompt": "a teapot", "concepts": [{"id": teapot["id"]}], "seed": seed} for seed in range(6)]}
    answer = server.client.post("/v1/pictures", json=body, headers={"Idempotency-Key": "p1"})
    assert answer.status_code == 202
    ids = [picture["id"] for picture in answer.json()["pictures"]]
    again = server.client.post("/v1/pictures", json=body, headers={"Idempotency-Key": "p1"}).json()["pictures"]
    assert [picture["id"] for picture in again] == ids
    for picture_id in ids:
        wait_for(lambda path=f"/v1/pictures/{picture_id}": server.client.get(path).json()["status"] == "done")
    listed = server.client.get("/v1/pictures?limit=5").json()  # one of them is on the next page
    assert [picture["id"] for picture in listed["pictures"]] == ids[:0:-1]
    assert listed["next"] is not None
    assert server.client.delete(f"/v1/pictures/{ids[0]}").status_code == 204
    assert detail(server.client.get(f"/v1/pictures/{ids[0]}"), 404)
    assert not (server.store / "pictures" / f"{ids[0]}.png").exists()


def test_settings(server: Running):
    asked = {"prompt": "a photo", "width": 24, "height": 16, "steps": 3, "guidance": 1, "scheduler": "euler"}
    (picture,) = drawn(server, asked | {"negative_prompt": "blue"})
    assert pixels(picture).shape == (16, 24, 3)
    assert picture["request"]["scheduler"] == "euler"


def test_likely_mistakes_are_told(server: Running, teapot):
    (picture,) = drawn(server, {"prompt": "a mug", "concepts": [{"id": teapot["id"]}]})
    assert picture["warnings"] == ["without the class word 'teapot', which the concept was learned with: 'a mug'"]


BAD = {
    "size": ({"width": 32}, "32x16: no size of this service; expected one of 16x16, 24x16"),
    "steps": ({"steps": 101}, "steps=101: expected at most 100"),
    "scheduler": ({"scheduler": "nothing"}, "scheduler='nothing': expected"),
    "prompt": ({"prompt": " "}, "body.pictures.0.prompt"),
    "nul": ({"prompt": "a\0"}, "a prompt holds a NUL"),
    "weights": ({"prompt": "(" * 200 + "a" + ")" * 200}, "more than 100 parentheses in each other"),
    "strength": ({"concepts": [{"id": "0" * 24, "strength": 3}]}, "body.pictures.0.concepts.0.strength"),
    "id": ({"concepts": [{"id": "../../etc"}]}, "body.pictures.0.concepts.0.id"),
    "unknown": ({"image": "x"}, "Extra inputs are not permitted"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes(server: Running, name):
    changes, expected = BAD[name]
    answer = server.client.post("/v1/pictures", json={"pictures": [{"prompt": "a"} | changes]})
    assert expected in detail(answer, 422)


def test_concepts_that_are_not_there(server: Running, teapot):
    missing = server.client.post("/v1/pictures", json={"pictures": [{"prompt": "a", "concepts": [{"id": "0" * 24}]}]})
    assert detail(missing, 404) == f"concept {'0' * 24}: not found"
    twice = [{"id": teapot["id"]}, {"id": teapot["id"], "strength": 0.5}]
    answer = server.client.post("/v1/pictures", json={"pictures": [{"prompt": "a", "concepts": twice}]})
    assert "expected another one for each concept" in detail(answer, 422)
    waiting = learn(server.client, "owl", steps="1000")
    body = {"pictures": [{"prompt": "a", "concepts": [{"id": waiting["id"]}]}]}
    answer = server.client.post("/v1/pictures", json=body)
    assert detail(answer, 409) == f"concept {waiting['id']}: not done; wait until it is"
    assert server.client.delete(f"/v1/concepts/{waiting['id']}").status_code == 204


def test_previews_do_not_hold_pictures_up(tiny_model, tmp_path):
    """Not even one for each step: who has waited longest is next, and older previews make room for newer ones."""
    with running(tmp_path / "store", tiny_model, sample__every=1) as server:
        for name in ("dog", "owl"):
            learn(server.client, name, steps="2000", prompts=[f"a {name}", f"a blue {name}", f"two {name}s"])
        wait_for(lambda: len(server.client.get("/v1/concepts").json()["concepts"][0]["previews"]) > 6)
        for seed in range(3):
            (picture,) = drawn(server, {"prompt": "a teapot", "seed": seed})
            assert picture["ended"] - picture["created"] < 20


def test_a_picture_that_fails_fails_alone(tiny_model, tmp_path):
    """With an error that nobody foresaw; the server lives, and so do the others of its batch."""
    before = """
import catversion_jax.sampling.branches as branches
from catversion_jax.sampling import sampler

found = sampler.branches_of

def spoiled(pipeline, prompt, concepts):
    if "broken" in prompt:
        raise ZeroDivisionError("division by zero")
    return found(pipeline, prompt, concepts)

sampler.branches_of = spoiled
"""
    with running(tmp_path / "store", tiny_model, before=before) as server:
        good, bad = drawn(server, {"prompt": "a teapot"}, {"prompt": "a broken teapot"})
        assert (good["status"], bad["status"]) == ("done", "failed")
        assert bad["error"] == "ZeroDivisionError: division by zero"
        assert server.client.get("/healthz").status_code == 200
