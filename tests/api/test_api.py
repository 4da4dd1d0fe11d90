"""The Python interface gives what the commands give, and says mistakes as they do."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import catversion_jax as cv
from catversion_jax.data import concept_sets
from catversion_jax.utils.errors import Interrupted
from tests.commands import ROOT, catversion

TEAPOT = concept_sets.SHIPPED / "teapot" / "train"
FILES = sorted(TEAPOT.glob("*.png"))
FEW = {"steps": 3, "sample__steps": 2, "sample__every": 0, "adapter__length": 2}


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return cv.Pipeline.from_pretrained(str(tiny_model))


@pytest.fixture(scope="module")
def teapot(pipe):
    return cv.learn(pipe, TEAPOT, class_word="teapot", config="mini", **FEW)


def test_importing_is_quick_and_silent():
    """JAX and Flax are imported when something of theirs is asked for."""
    code = "import catversion_jax, sys; print(catversion_jax.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{cv.__version__} False False\n", "")


def test_what_is_exported():
    assert {name: getattr(cv, name) for name in cv.__all__}.keys() == set(cv.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lern'"):
        _ = cv.lern


def test_learn_gives_what_train_gives(pipe, teapot, tiny_model, tmp_path):
    steps = []
    kept = cv.learn(pipe, str(TEAPOT), "teapot", run_dir=tmp_path / "api", on_step=steps.append, config="mini", **FEW)
    values = {"run_dir": tmp_path / "run", "data.dir": TEAPOT, "concept.class_word": "teapot"}
    values |= {"model.path": tiny_model, "train.steps": 3, "sample.steps": 2, "sample.every": 0, "adapter.length": 2}
    catversion("train", "--config=mini", *(f"--config.{key}={value}" for key, value in values.items()), here=True)
    files = [(tmp_path / name / "concept.safetensors").read_bytes() for name in ("api", "run")]
    assert files[0] == files[1]
    assert [row.step for row in steps] == [1, 2, 3]
    assert all(row.loss > 0 for row in steps)
    np.testing.assert_array_equal(kept.learned["prefix"], teapot.learned["prefix"])
    again = cv.learn(pipe, TEAPOT, "teapot", run_dir=tmp_path / "api", on_step=steps.append, config="mini", **FEW)
    np.testing.assert_array_equal(again.learned["prefix"], kept.learned["prefix"])
    assert len(steps) == 3, "nothing is left to learn"


def test_photos_in_memory_and_files(pipe, teapot):
    """In any form they are the same photos; only the masks of a folder are missing."""
    images = [Image.open(path) for path in FILES]
    for photos in (images, FILES, [str(path) for path in FILES]):
        learned = cv.learn(pipe, photos, "teapot", config="mini", **FEW)
        np.testing.assert_array_equal(learned.learned["prefix"], teapot.learned["prefix"])


def test_pictures_are_those_of_generate(pipe, teapot, tiny_model, tmp_path):
    teapot.save(tmp_path / "teapot.safetensors")
    again = cv.Concept.load(tmp_path / "teapot.safetensors")
    assert again.class_word == "teapot"
    images = pipe(["a teapot", "a red teapot"], concepts=[again], num=2, seed=5, negative_prompt="fog")
    given = [f"--embedding={tmp_path / 'teapot.safetensors'}", f"--model={tiny_model}", "--num=2", "--seed=5"]
    prompts = ["--prompt=a teapot", "--prompt=a red teapot", "--negative_prompt=fog"]
    catversion("generate", *given, *prompts, f"--out={tmp_path / 'out'}")
    names = ["a-teapot_*_5", "a-teapot_*_6", "a-red-teapot_*_5", "a-red-teapot_*_6"]
    for image, name in zip(images, names, strict=True):
        (path,) = (tmp_path / "out").glob(f"{name}.png")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path)))
        assert image.info == Image.open(path).info
    (base,) = pipe("a teapot", steps=2, scheduler="ddim", guidance=5.0)
    (alone,) = pipe("a teapot", again.at(0.0), steps=2, scheduler="ddim", guidance=5.0)
    np.testing.assert_array_equal(np.asarray(base), np.asarray(alone))


def test_many(pipe, teapot, tmp_path):
    """Each as it is learned alone; one that fails is told, and the others are learned."""
    jobs = [
        {"id": "files", "photos": FILES, "class_word": "teapot"},
        {"id": "folder", "photos": TEAPOT, "class_word": "teapot"},
        {"id": "memory", "photos": [Image.open(path) for path in FILES], "class_word": "teapot", "steps": 2},
        {"id": "nothing", "photos": tmp_path, "class_word": "teapot"},
    ]
    ended = {done.status.id: done for done in cv.learn_many(pipe, jobs, config="mini", batch__slots=2, **FEW)}
    assert {id: done.status.status for id, done in ended.items()} == {
        "files": "done", "folder": "done", "memory": "done", "nothing": "failed",
    }  # fmt: skip
    assert "0 photos" in ended["nothing"].status.error
    assert ended["memory"].concept.steps == 2
    for id in ("files", "folder"):
        np.testing.assert_allclose(ended[id].concept.learned["prefix"], teapot.learned["prefix"], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: cv.Pipeline.from_pretrained(dtype="int8"), "dtype='int8': expected one of float32, bfloat16"),
        (lambda pipe: cv.Pipeline.from_pretrained(size=3), "size: expected some of revision, variant"),
        (lambda pipe: cv.Pipeline.from_pretrained("no/such/model"), "no/such/model: not found"),
        (lambda pipe: cv.learn(pipe, TEAPOT, "teapot", stepps=3), "stepps: no such setting"),
        (lambda pipe: cv.learn(pipe, TEAPOT, "teapot", steps=0), r"config.train.steps=0: expected"),
        (lambda pipe: cv.learn(pipe, TEAPOT, ""), "config.concept.class_word=''"),
        (lambda pipe: cv.learn(pipe, [], "teapot"), "0 photos; expected 1 to 100"),
        (lambda pipe: cv.learn(pipe, ["x.jpg"], "teapot"), "x.jpg: cannot be read"),
        (lambda pipe: cv.learn(pipe, TEAPOT, "teapot", config="mini:lora"), "lora"),
        (lambda pipe: list(cv.learn_many(pipe, [{"id": "a"}])), "no class_word, photos"),
        (lambda pipe: pipe("a teapot", steps=0), "steps=0: expected"),
        (lambda pipe: pipe("a teapot", stepps=1), "stepps: expected some of scheduler"),
        (lambda pipe: cv.Concept.load("nowhere"), "nowhere: not found"),
    ],
)
def test_mistakes(pipe, call, message):
    with pytest.raises(cv.UserError, match=message):
        call(pipe)


def test_a_concept_of_another_model(teapot):
    with pytest.raises(cv.UserError, match="a concept works only with the base model it was learned on"):
        cv.Pipeline.from_pretrained()("a teapot", teapot)


def test_a_signal_is_told(pipe, tmp_path):
    def stop(row) -> None:
        if row.step == 2:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)

    with pytest.raises(Interrupted):
        cv.learn(pipe, TEAPOT, "teapot", run_dir=tmp_path / "run", on_step=stop, config="mini", **FEW | {"steps": 9})
    concept = cv.learn(pipe, TEAPOT, "teapot", run_dir=tmp_path / "run", config="mini", **FEW | {"steps": 9})
    assert concept.steps == 9
