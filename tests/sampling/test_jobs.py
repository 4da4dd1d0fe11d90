"""Pictures of different concepts in one batch: each is the one that it is by itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.dreambooth import DreamBooth
from catversion_jax.methods.textual_inversion import TextualInversion
from catversion_jax.sampling import branches, sampler
from tests.commands import catversion, error_of
from tests.conftest import max_error

CONFIG = SamplerConfig(steps=2, guidance=3.0, batch_size=4)
FILL = "photo " * 74


@pytest.fixture(scope="module")
def others(tiny_pipeline, loaded) -> list:
    """Concepts of the other methods."""
    rng = np.random.default_rng(5)
    word = rng.normal(size=32).astype(np.float32)
    unet = jax.tree.map(
        lambda x: np.asarray(x) + rng.normal(0, 0.02, x.shape).astype(x.dtype), tiny_pipeline.params["unet"]
    )
    inverted = dataclasses.replace(loaded[0], method=TextualInversion(), learned={"word": word})
    tuned = dataclasses.replace(loaded[0], method=DreamBooth(identifier="sks"), learned={"unet": unet})
    return [inverted, tuned]


def test_each_is_the_one_by_itself(tiny_pipeline, loaded, others, monkeypatch):
    """Of every method, with several concepts, at other strengths, and with prompts of other lengths."""
    teapot, dog = loaded
    inverted, tuned = others
    asked = [
        ("a teapot", [teapot]),
        ("a dog", [dog]),
        ("a teapot", []),
        ("a teapot and a dog", [teapot, dog]),
        ("a teapot", [teapot.at(0.3)]),
        ("a teapot", [tuned]),
        ("a (teapot:1.3)", [inverted]),
        (f"{FILL} a teapot", [teapot]),
        ("a teapot at night", [tuned]),
        ("a teapot and a dog", [dog, teapot.at(0.0)]),
        ("a dog and a teapot", [teapot, dog]),
    ]
    prompts, of_each = zip(*asked, strict=True)
    request = sampler.SampleRequest(prompts, tuple(range(len(asked))), CONFIG)
    sizes, join = [], branches.join_branches
    monkeypatch.setattr(
        sampler, "join_branches", lambda rows, *rest: sizes.append(len({*map(id, rows)})) or join(rows, *rest)
    )
    found = dict(sampler.sample_each(tiny_pipeline, request, of_each))
    assert sorted(found) == list(range(len(asked)))
    assert sorted(sizes, reverse=True) == [4, 2, 2, 2, 1]
    monkeypatch.undo()
    for i, (prompt, concepts) in enumerate(asked):
        alone = sampler.SampleRequest((prompt,), (i,), CONFIG)
        (image,) = sampler.sample_images(tiny_pipeline, alone, concepts)
        assert max_error(found[i], image) <= 1, (prompt, i)  # of 255


def test_latents_to_1e5(tiny_pipeline, loaded):
    teapot, dog = loaded
    request = sampler.SampleRequest(("a teapot", "a dog", "a teapot in the snow"), (1, 2, 3), CONFIG)
    of_each = [[teapot], [dog], [teapot.at(0.5)]]
    ((images, together),) = sampler.latent_batches(tiny_pipeline, request, of_each, in_order=False)
    for place, i in enumerate(images):
        alone = sampler.SampleRequest(request.prompts[i : i + 1], request.seeds[i : i + 1], CONFIG)
        ((latents, _),) = sampler.sample_latents(tiny_pipeline, alone, of_each[i])
        assert max_error(together[place], latents[0]) < 1e-5


def write(path, *jobs):
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return f"--jobs={path}"


def test_the_command(tmp_path, concepts):
    """Names, the index and the texts; a second call samples what is new alone, and `--like` makes one again."""
    teapot, dog = concepts
    (tmp_path / "dog").symlink_to(dog)  # a relative path starts at the file's folder
    first = {"prompt": "a teapot", "concepts": [str(teapot)], "strengths": [0.4], "seed": 7}
    second = {"prompt": "a dog", "concepts": ["dog"]}
    both = {"prompt": "a teapot and a dog", "concepts": [str(teapot), "dog"], "strengths": [None, 1.0]}
    out, few = tmp_path / "out", ("--steps=2", "--batch_size=2")
    jobs = write(tmp_path / "jobs.jsonl", first, second, both, first, {"prompt": "a car"})
    done = catversion("generate", jobs, f"--out={out}", *few)
    assert done.stdout == f"4 images in {out}, 1 were there; index.jsonl tells which is which job's\n"
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [line["job"] for line in index] == [f"{tmp_path / 'jobs.jsonl'}:{i}" for i in range(1, 6)]
    assert index[0]["file"] == index[3]["file"]
    assert {line["file"] for line in index} == {path.name for path in out.glob("*.png")}
    with Image.open(out / index[2]["file"]) as image:
        said = json.loads(image.info["catversion"])
    assert [(used["class_word"], used["strength"]) for used in said["concepts"]] == [("teapot", 0.7), ("dog", 1.0)]
    kept = (out / "index.jsonl").read_text()
    before = {path: path.read_bytes() for path in out.glob("*.png")}
    jobs = write(tmp_path / "more.jsonl", first, {**second, "seed": 1}, {**first, "strengths": [0.5]})
    assert catversion("generate", jobs, f"--out={out}", *few).stdout.startswith("2 images in")
    assert len(list(out.glob("*.png"))) == 6
    assert (out / "index.jsonl").read_text().startswith(kept)
    assert len((out / "index.jsonl").read_text().splitlines()) == 8
    assert {path: path.read_bytes() for path in before} == before
    alone = (f"--embedding={teapot}", "--strength=0.4", "--prompt=a teapot", "--seed=7", "--num=1")
    single = catversion("generate", *alone, f"--out={tmp_path / 'single'}", *few)
    assert "1 images" in single.stdout
    again = tmp_path / "single" / index[0]["file"]
    with Image.open(again) as ours, Image.open(out / again.name) as theirs:
        assert max_error(np.asarray(ours), np.asarray(theirs)) <= 1
    like = catversion("generate", f"--like={out / index[1]['file']}", f"--out={tmp_path / 'like'}")
    assert like.stdout.startswith("1 images")
    assert (tmp_path / "like" / index[1]["file"]).is_file()


def test_mistakes(tmp_path, concepts, caplog):
    """Each names the line, before anything is sampled."""
    teapot = str(concepts[0])
    out = f"--out={tmp_path / 'out'}"
    good = {"prompt": "a teapot", "concepts": [teapot]}

    def message(*jobs, flags=()):
        return error_of("generate", write(tmp_path / "jobs.jsonl", *jobs), out, "--steps=1", *flags)

    place = f"{tmp_path / 'jobs.jsonl'}:2"
    assert f"{place}: Object missing required field `prompt`" in message(good, {"concepts": []})
    assert f"{place}: Object contains unknown field `strength`" in message(good, good | {"strength": 1})
    assert f"{place}: 2 strengths for 1 concepts; expected one for each" in message(good, good | {"strengths": [1, 1]})
    assert f"{place}: Expected `float` <= 2.0" in message(good, good | {"strengths": [3]})
    missing = message(good, good | {"concepts": ["nothing"]})
    assert f"{place}: {tmp_path / 'nothing'}: not found" in missing
    twice = [teapot, f"{teapot}/concept.safetensors"]
    assert f"{place}: class words ['teapot', 'teapot']" in message(good, good | {"concepts": twice})
    assert f"{place}: prompt 'a (red:inf) teapot': the weight of 'red' is inf" in message(
        good, good | {"prompt": "a (red:inf) teapot"}
    )
    assert "--jobs: empty; expected a file" in error_of("generate", "--jobs=", out)
    assert "--seed: not with --jobs" in message(good, flags=("--seed=1",))
    assert "--embedding: not with --jobs" in message(good, flags=(f"--embedding={teapot}",))
    (tmp_path / "empty").write_text("\n")
    assert f"{tmp_path / 'empty'}: no lines" in error_of("generate", f"--jobs={tmp_path / 'empty'}", out)
    assert "none: cannot be read" in error_of("generate", f"--jobs={tmp_path / 'none'}", out)
    assert not list((tmp_path / "out").glob("*.png"))
    lacking = good | {"prompt": "a car"}
    done = catversion("generate", write(tmp_path / "jobs.jsonl", lacking, good, lacking), out, "--steps=1")
    assert f"{place[:-1]}1, {place[:-1]}3: without the class word 'teapot'" in done.stderr
