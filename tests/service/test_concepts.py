"""Concepts over HTTP: what comes in as photos goes out as what `catversion train` would have learned from them."""

import io
import json
import zipfile

import httpx
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from catversion_jax.config import load_config
from catversion_jax.config.config import from_config_dict
from catversion_jax.methods import concept_file
from catversion_jax.training.run import train
from catversion_jax.training.run_dir import RunDir
from tests.service.servers import CONCEPTS, STEPS, Running, detail, ended, learn, photos, running, wait_for


def loaded(client: httpx.Client, concept_id: str, tmp_path) -> concept_file.Concept:
    path = tmp_path / f"{concept_id}.safetensors"
    path.write_bytes(client.get(f"/v1/concepts/{concept_id}/concept.safetensors").content)
    return concept_file.load(path)


def solo(tiny_model, tiny_pipeline, tmp_path, **changes) -> concept_file.Concept:
    """What `catversion train` learns from the same photos with the same config."""
    config = from_config_dict(load_config("mini"), ("run_dir", "data.dir", "concept.class_word"))
    config = config.replaced({
        "model.path": str(tiny_model), "adapter.length": 2, "train.steps": STEPS, "train.batch_size": 2,
        "sample.steps": 2, "sample.every": 0, "run_dir": str(tmp_path / "solo"),
        "data.dir": str(CONCEPTS / "teapot" / "train"), "concept.class_word": "teapot", **changes,
    })  # fmt: skip
    return train(config, RunDir.of(config), tiny_pipeline).concept


def test_a_concept_equals_that_of_train(server: Running, teapot, tiny_model, tiny_pipeline, tmp_path):
    concept = loaded(server.client, teapot["id"], tmp_path)
    expected = solo(tiny_model, tiny_pipeline, tmp_path)
    np.testing.assert_allclose(concept.learned["prefix"], expected.learned["prefix"], atol=1e-4)
    assert (concept.class_word, concept.steps, concept.seed) == ("teapot", STEPS, 0)
    assert (teapot["status"], teapot["step"], teapot["steps"], teapot["error"]) == ("done", STEPS, STEPS, None)
    assert [step for step, _ in teapot["losses"]] == list(range(1, STEPS + 1))
    assert teapot["losses"][-1][1] == pytest.approx(teapot["loss"], abs=1e-6)
    assert teapot["seconds"] > 0
    assert teapot["position"] is None


def test_its_pictures(server: Running, teapot, tiny_pipeline):
    """The photos as training sees them, and the previews of the middle and of the end."""
    for path, file in zip(teapot["photos"], sorted((CONCEPTS / "teapot" / "train").glob("*.png")), strict=True):
        seen = np.asarray(Image.open(io.BytesIO(server.client.get(path).content)))
        assert seen.shape == (16, 16, 3)
        small = Image.open(file).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
        assert np.abs(seen.astype(int) - np.asarray(small).astype(int)).mean() < 2
    assert [(preview["step"], preview["prompt"]) for preview in teapot["previews"]] == [
        (step, prompt) for step in (4, 6) for prompt in ("a photo of a teapot on the beach", "a blue teapot")
    ]  # fmt: skip
    for preview in teapot["previews"]:
        answer = server.client.get(preview["url"])
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (16, 16)
    assert detail(server.client.get(f"/v1/concepts/{teapot['id']}/photos/99"), 404) == "photo 99: not found"
    assert detail(server.client.get(f"/v1/concepts/{teapot['id']}/photos/{'1' * 300}"), 422)


def test_an_export(server: Running, teapot):
    packed = zipfile.ZipFile(io.BytesIO(server.client.get(f"/v1/concepts/{teapot['id']}/export.zip").content))
    assert {"teapot.safetensors", "catversion_torch.py", "ComfyUI/custom_nodes/catversion/__init__.py"} <= set(
        packed.namelist()
    )


def test_masks_captions_seed_and_steps(server: Running, tiny_model, tiny_pipeline, tmp_path):
    """In the order of the images; the captions are prompts, and the seed and the steps are of this concept alone."""
    of_masks = sorted((CONCEPTS / "teapot" / "train_masks").iterdir())
    masks = [("masks", (path.name, path.read_bytes())) for path in of_masks]
    captions = [f"a teapot number {i}" for i in range(5)]
    fields = {"class_word": "teapot", "seed": "7", "steps": "4", "captions": captions}
    answer = server.client.post("/v1/concepts", files=[*photos(), *masks], data=fields)
    found = ended(server.client, answer.json()["id"])
    assert (found["status"], found["steps"], found["step"]) == ("done", 4, 4)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, path in enumerate(sorted((CONCEPTS / "teapot" / "train").glob("*.png"))):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
        (folder / f"{i}.txt").write_text(captions[i])
    (folder / "masks").mkdir()
    for i, path in enumerate(of_masks):
        (folder / "masks" / f"{i}.png").write_bytes(path.read_bytes())
    changes = {"data.dir": str(folder), "seed": 7, "train.steps": 4}
    expected = solo(tiny_model, tiny_pipeline, tmp_path, **changes)
    concept = loaded(server.client, found["id"], tmp_path)
    np.testing.assert_allclose(concept.learned["prefix"], expected.learned["prefix"], atol=1e-4)
    dimmed = np.asarray(Image.open(io.BytesIO(server.client.get(found["photos"][0]).content)))
    assert dimmed[0].max() < 80  # its corner is background


def test_masks_that_are_made(server: Running):
    found = ended(server.client, learn(server.client, create_masks="true")["id"])
    assert found["status"] == "done"
    assert len(found["photos"]) == 5


def test_a_zip_file(server: Running, teapot, tmp_path):
    """As somebody packs a folder: with a folder inside, captions and what macOS adds."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted((CONCEPTS / "teapot" / "train").glob("*.png")):
            archive.write(path, f"my photos/{path.name}")
        archive.writestr("__MACOSX/._00.png", b"x")
        archive.writestr("my photos/notes.pdf", b"x")
    answer = server.client.post(
        "/v1/concepts", files={"zip": ("../photos.zip", packed.getvalue())}, data={"class_word": "teapot"}
    )
    found = ended(server.client, answer.json()["id"])
    ours, theirs = (loaded(server.client, of["id"], tmp_path).learned["prefix"] for of in (found, teapot))
    np.testing.assert_array_equal(ours, theirs)


def test_its_prompts(server: Running):
    prompts = ["a red teapot", "a teapot in the snow"]
    found = ended(server.client, learn(server.client, steps="2", prompts=prompts)["id"])
    assert [preview["prompt"] for preview in found["previews"]] == prompts


def test_events(server: Running):
    """From the first to the last step, and then the stream ends by itself."""
    concept = learn(server.client)
    events = []
    with server.client.stream("GET", f"/v1/concepts/{concept['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
    assert events[-1]["status"] == "done"
    assert len([preview for preview in events[-1]["previews"] if preview["step"] == STEPS]) == 2
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)
    assert {"training", "done"} <= {event["status"] for event in events}


def test_a_retry_is_harmless(server: Running):
    """The same key gives the same concept; another request with that key is refused."""
    key = {"Idempotency-Key": "6c1f"}
    first = learn(server.client, "owl", key, steps="2")
    assert learn(server.client, "owl", key, steps="2")["id"] == first["id"]
    answer = server.client.post(
        "/v1/concepts", files=photos("owl"), data={"class_word": "bird", "steps": "2"}, headers=key
    )
    assert "another request came with this key" in detail(answer, 422)
    ended(server.client, first["id"])
    assert learn(server.client, "owl", key, steps="2")["id"] == first["id"]
    assert not list((server.store / "incoming").iterdir())


def test_pages_of_a_list(server: Running, teapot):
    ids, after = [], ""
    while True:
        page = server.client.get(f"/v1/concepts?limit=2{after}").json()
        ids += [concept["id"] for concept in page["concepts"]]
        if page["next"] is None:
            break
        assert len(page["concepts"]) == 2
        after = f"&after={page['next']}"
    assert teapot["id"] in ids
    assert len(set(ids)) == len(ids)
    whole = server.client.get("/v1/concepts?limit=200").json()["concepts"]
    assert ids == [concept["id"] for concept in whole]
    assert [concept["created"] for concept in whole] == sorted((c["created"] for c in whole), reverse=True)


def test_removal_leaves_nothing(server: Running):
    """Neither photos nor what was learned, nor pictures of it; not even in the checkpoints or the database's file."""
    concept = learn(server.client, "rocket", steps="3")
    done = ended(server.client, concept["id"])
    word = "a rocket over unmistakableville"
    picture = {"prompt": word, "concepts": [{"id": done["id"]}]}
    (drawn,) = server.client.post("/v1/pictures", json={"pictures": [picture], "wait": True}).json()["pictures"]
    assert (server.store / "pictures" / f"{drawn['id']}.png").is_file()
    assert server.client.delete(f"/v1/concepts/{done['id']}").status_code == 204
    assert detail(server.client.get(f"/v1/concepts/{done['id']}"), 404) == f"concept {done['id']}: not found"
    assert detail(server.client.get(f"/v1/pictures/{drawn['id']}"), 404)
    assert not (server.store / "concepts" / done["id"]).exists()
    for path in server.store.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert done["id"].encode() not in data, path
            assert b"unmistakableville" not in data, path


def test_one_that_trains_is_cancelled(server: Running):
    concept = learn(server.client, "dog", steps="2000")
    wait_for(lambda: server.client.get(f"/v1/concepts/{concept['id']}").json()["step"] > 2)
    assert server.client.delete(f"/v1/concepts/{concept['id']}").status_code == 204
    found = server.client.get(f"/v1/concepts/{concept['id']}").json()
    assert (found["status"], found["class_word"], found["photos"]) == ("cancelled", "-", [])
    assert not (server.store / "concepts" / concept["id"]).exists()
    for path in (server.store / "checkpoints").rglob("*"):
        assert not path.is_file() or concept["id"].encode() not in path.read_bytes()
    assert server.client.delete(f"/v1/concepts/{concept['id']}").status_code == 204
    assert server.client.get(f"/v1/concepts/{concept['id']}").status_code == 404


def test_one_that_is_prepared_is_cancelled(server: Running):
    """While both slots are taken; nothing of it comes back when they are free again."""
    training = [learn(server.client, "dog", steps="2000") for _ in range(2)]
    wait_for(lambda: server.client.get(f"/v1/concepts/{training[1]['id']}").json()["step"] > 0)
    prepared = learn(server.client, "owl")
    wait_for(lambda: server.client.get(f"/v1/concepts/{prepared['id']}").json()["status"] == "preparing")
    for concept in (prepared, *training):
        assert server.client.delete(f"/v1/concepts/{concept['id']}").status_code == 204
    assert ended(server.client, learn(server.client, steps="1")["id"], previews=False)["status"] == "done"
    assert server.client.get(f"/v1/concepts/{prepared['id']}").json()["status"] == "cancelled"
    assert not (server.store / "concepts" / prepared["id"]).exists()
    assert server.client.get("/healthz").status_code == 200


def test_what_was_learned_is_gone_from_the_checkpoints(server: Running):
    """What is saved after a removal is the state of the one that stays."""
    first, second = (learn(server.client, name, steps="2000") for name in ("dog", "owl"))
    for concept in (first, second):
        wait_for(lambda path=f"/v1/concepts/{concept['id']}": server.client.get(path).json()["step"] > 2)
    assert server.client.delete(f"/v1/concepts/{second['id']}").status_code == 204
    removed_at = server.client.get(f"/v1/concepts/{first['id']}").json()["step"]
    wait_for(lambda: server.client.get(f"/v1/concepts/{first['id']}").json()["step"] > removed_at + 6)
    folder = server.store / "checkpoints"
    newest = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        state = reader.restore(folder / str(newest) / "state")
    used = [bool(np.any(of_slot)) for of_slot in state["learned"]["prefix"]]
    assert used == [True]
    assert server.client.delete(f"/v1/concepts/{first['id']}").status_code == 204


def test_with_other_prompts_in_the_config(tiny_model, tmp_path):
    """A server that is started with fewer previews lists those that were drawn."""
    with running(tmp_path / "store", tiny_model) as server:
        before = ended(server.client, learn(server.client, steps="1")["id"])
    fewer = {"sample__prompts": "'a {class_word}',"}
    with running(tmp_path / "store", tiny_model, **fewer) as server:
        (after,) = server.client.get("/v1/concepts").json()["concepts"]
        assert after["previews"] == before["previews"]


BAD = {
    "no photos": ([], {}, "photos: expected them in one way: as `images` (repeated), as one `zip`, or as `urls`"),
    "no photo": ([("images", ("a.jpg", b"no photo"))], {}, "photos/000: not a JPEG, PNG, WEBP, HEIC or AVIF image"),
    "both": ([*photos(), ("zip", ("a.zip", b"x"))], {}, "photos: expected them in one way"),
    "no zip": ([("zip", ("a.zip", b"x"))], {}, "zip: not a readable zip file"),
    "too many": (photos() * 4, {}, "20 photos; expected at most 16, which is what a slot of this service has room for"),
    "masks": ([*photos(), ("masks", ("a.png", b"x"))], {}, "masks: 1 for 5 images; expected one for each"),
    "captions": (photos(), {"captions": ["a"]}, "captions: 1 for 5 images; expected one for each"),
    "steps": (photos(), {"steps": "100000"}, "steps=100000: expected at most 2000"),
    "no number": (photos(), {"steps": "many"}, "body.steps: Input should be a valid integer"),
    "class": (photos(), {"class_word": "a{b}"}, "config.concept.class_word='a{b}': expected the base class"),
    "prompts": (photos(), {"prompts": ["a"] * 5}, "prompts: 5; expected at most 4"),
    "field": (photos(), {"prompts": ["a {colour} teapot"]}, "colour"),
    "unknown": (photos(), {"learning_rate": "1"}, "body.learning_rate: Extra inputs are not permitted"),
    "url": ([], {"urls": ["https://example.com/a.jpg"]}, "example.com is not on this service's list"),
    "webhook": (photos(), {"webhook_url": "http://example.com"}, "no https:// URL"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes(server: Running, name):
    files, fields, expected = BAD[name]
    answer = server.client.post("/v1/concepts", files=files or None, data={"class_word": "teapot"} | fields)
    said = detail(answer, 422)
    assert expected in said
    assert str(server.store) not in said
    assert not list((server.store / "incoming").iterdir())


def test_a_damaged_photo_fails_alone(server: Running):
    """What cannot be seen before it is decoded."""
    data = photos()[0][1][1]
    bad = [("images", ("a.png", data[: len(data) // 2])), *photos()[1:]]
    answer = server.client.post("/v1/concepts", files=bad, data={"class_word": "teapot", "steps": "2"})
    good = learn(server.client, "dog", steps="2")
    found = ended(server.client, answer.json()["id"])
    assert found["status"] == "failed"
    assert found["error"].startswith("photos/000.png: damaged or truncated image")
    assert ended(server.client, good["id"])["status"] == "done"
    assert detail(server.client.get(f"/v1/concepts/{found['id']}/concept.safetensors"), 409)


def test_a_check_of_photos(server: Running):
    answer = server.client.post("/v1/checks", files=[*photos(), *photos(count=1)]).json()
    assert len(answer["photos"]) == 6
    assert answer["photos"][0]["image"].startswith("data:image/png;base64,")
    assert answer["photos"][0]["subject"] is None
    assert any("nearly the same as 000" in line for line in answer["photos"][5]["warnings"])
    assert not list((server.store / "incoming").iterdir())


def test_one_server_has_the_store(server: Running, tiny_model):
    with pytest.raises(AssertionError, match="another server is at work here"):
        Running(server.store, tiny_model)
