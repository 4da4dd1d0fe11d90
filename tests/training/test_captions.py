"""A photo is trained on its own caption, in a run and in a batch, and goes on with it after an interruption."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import catversion_jax as cv
from catversion_jax.config import Config
from catversion_jax.data import concept_sets
from catversion_jax.data.photos import training_photos
from catversion_jax.methods import concept_file
from catversion_jax.training import step as ts
from catversion_jax.training.concept_data import prepare
from catversion_jax.training.training_prompts import check_prompts, training_prompts
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of

TEAPOT = concept_sets.SHIPPED / "teapot" / "train"
SNOW = "{concept} in the snow"


def folder_with(folder, captions: dict[int, str]):
    """The teapot's photos, with captions by their places."""
    folder.mkdir()
    for i, path in enumerate(sorted(TEAPOT.glob("*.png"))):
        Image.open(path).save(folder / path.name)
        if i in captions:
            (folder / f"{path.stem}.txt").write_text(captions[i])
    return folder


def config_of(folder, **changes) -> Config:
    return Config().replaced({"data.dir": str(folder), "concept.class_word": "teapot"} | changes)


def texts_of(mini, config: Config) -> list[list[str]]:
    """The prompts of each photo."""
    photos = training_photos(config.data, mini.networks.resolution)
    found = training_prompts(config, config.make_method(mini.networks), mini, photos)
    spans = zip(found.first_prompt, found.prompt_count, strict=True)
    return [found.texts[first : first + count] for first, count in spans]


METHODS = ["catversion", "textual_inversion", "dreambooth", "custom_diffusion"]


@pytest.mark.parametrize("method", METHODS)
def test_captions_take_the_place_of_templates(mini, tmp_path, method, caplog):
    folder = folder_with(tmp_path / "photos", {0: SNOW, 2: "my teapot, outdoors", 3: "a cup", 4: "a teapotlike thing"})
    config = config_of(folder, method=method, **{"concept.templates": ("a photo of {concept}", "one {class_word}")})
    templates = ["a photo of a teapot", "one teapot"]
    assert texts_of(mini, config) == [
        ["a teapot in the snow"], templates, ["my teapot, outdoors"], templates, templates,
    ]  # fmt: skip
    caplog.clear()
    photos = training_photos(config.data, mini.networks.resolution)
    check_prompts(config, config.make_method(mini.networks), mini, photos)
    (warning,) = caplog.messages
    assert warning.startswith("captions of 03, 04 are not used, as they do not hold 'teapot' within")


def test_long_captions(mini, tmp_path, caplog):
    long = "a very long caption " * 30
    config = config_of(folder_with(tmp_path / "photos", {0: f"{long} of {{concept}}", 1: f"{{concept}}, {long}"}))
    assert list(map(len, texts_of(mini, config))) == [1] * 5
    assert texts_of(mini, config)[0] == ["a photo of a teapot"]
    photos = training_photos(config.data, mini.networks.resolution)
    check_prompts(config, config.make_method(mini.networks), mini, photos)
    assert [message.split(" ")[:3] for message in caplog.messages] == [
        ["captions", "of", "00"], ["captions", "are", "too"],
    ]  # fmt: skip
    assert "cut off after 77 tokens" in caplog.messages[1]


def test_other_fields_are_refused(mini, tmp_path):
    config = config_of(folder_with(tmp_path / "photos", {1: "a {thing}"}))
    with pytest.raises(UserError, match=r"caption of the photo 01: .*the only fields are"):
        texts_of(mini, config)


def test_what_a_step_draws(mini, tmp_path):
    """Photo and prompt belong together in every draw, and in the evaluation's fixed batch."""
    config = config_of(
        folder_with(tmp_path / "photos", {0: SNOW, 3: "{concept} at night"}),
        **{"concept.templates": ("{concept}", "a photo of {concept}"), "train.batch_size": 64, "data.flip": False},
    )
    step = ts.StepConfig.of(config, mini.networks)
    photos = training_photos(config.data, mini.networks.resolution)
    data = jax.tree.map(lambda x: x[0], prepare(config, step.method, mini, photos))
    # Each photo and each prompt by a number of its own: its latents' mean, and its first token's state.
    data = data.replace(
        mean=np.zeros_like(data.mean) + np.arange(len(data.mean)).reshape(-1, 1, 1, 1, 1), std=0 * data.std
    )
    hidden = np.asarray(data.prompts[0].hidden)
    hidden = np.zeros_like(hidden) + np.arange(len(hidden)).reshape(-1, 1, 1)
    data = data.replace(prompts=(data.prompts[0].replace(hidden=hidden),))
    expected = {(0, 2), (3, 3)} | {(photo, prompt) for photo in (1, 2, 4) for prompt in (0, 1)}
    state = jax.tree.map(lambda x: x[0], step.init_state([0]))
    for batch, all_of_them in (
        (ts.draw_minibatch(state, data, step), True),
        (ts.fixed_batch(data, step), False),
    ):
        drawn = {
            (round(float(latents.mean())), round(float(hidden.mean())))
            for latents, hidden in zip(batch.latents, batch.prompts[0].hidden, strict=True)
        }
        assert drawn == expected if all_of_them else drawn <= expected


FEW = {"train.steps": 4, "train.batch_size": 2, "checkpoint.every": 2, "sample.every": 0, "sample.steps": 2}


def flags_of(model, run, photos, **changes) -> list[str]:
    settings = FEW | {"model.path": model, "concept.class_word": "teapot", "run_dir": run, "data.dir": photos} | changes
    return ["--config=mini", *(f"--config.{key}={value}" for key, value in settings.items())]


def test_the_command(tiny_model, tmp_path):
    """A caption for every photo is what a template of the same text is; the run says how many there are."""
    own = folder_with(tmp_path / "own", dict.fromkeys(range(5), SNOW))
    said = catversion("train", *flags_of(tiny_model, tmp_path / "a", own), here=True).stdout
    assert "photos:   5, 5 with captions\n" in said
    template = {"concept.templates": (SNOW,)}
    said = catversion("train", *flags_of(tiny_model, tmp_path / "b", TEAPOT, **template), here=True).stdout
    assert "photos:   5\n" in said
    np.testing.assert_array_equal(*(concept_file.load(tmp_path / name).learned["prefix"] for name in "ab"))
    (own / "00.txt").write_text("a {thing}")
    assert "caption of the photo 00" in error_of("train", *flags_of(tiny_model, tmp_path / "bad", own))


def test_in_a_batch(tiny_model, tmp_path):
    """Concepts with and without captions share one step, and each learns what it learns alone."""
    folders = {
        "none": folder_with(tmp_path / "none", {}),
        "some": folder_with(tmp_path / "some", {1: SNOW, 4: "{concept} at night"}),
        "all": folder_with(tmp_path / "all", {i: f"{{concept}} of number {i}" for i in range(5)}),
    }
    pipe = cv.Pipeline.from_pretrained(tiny_model)
    settings = {key.replace(".", "__"): value for key, value in FEW.items()} | {"train__steps": 3}
    jobs = [{"id": id, "photos": folder, "class_word": "teapot"} for id, folder in folders.items()]
    together = {
        ended.status.id: ended.concept
        for ended in cv.learn_many(pipe, jobs, batch__slots=2, batch__previews=0, **settings)
    }
    for id, folder in folders.items():
        alone = cv.learn(pipe, folder, "teapot", **settings)
        np.testing.assert_allclose(together[id].learned["prefix"], alone.learned["prefix"], atol=1e-4)
    assert np.abs(together["none"].learned["prefix"] - together["all"].learned["prefix"]).max() > 1e-3


def test_an_interrupted_run_goes_on_with_its_captions(tiny_model, tmp_path):
    """With those that it stored, whatever has become of the files."""
    own, run = folder_with(tmp_path / "own", {0: SNOW, 1: "{concept} at night"}), tmp_path / "run"
    catversion("train", *flags_of(tiny_model, run, own), here=True)
    whole = (run / "concept.safetensors").read_bytes()
    for file in (*run.glob("*.png"), run / "concept.safetensors", run / "status.json"):
        file.unlink()
    shutil.rmtree(run / "checkpoints" / "4")
    (own / "01.txt").unlink()
    said = catversion("train", *flags_of(tiny_model, run, own), "--resume", here=True).stdout
    assert "photos:   5, 2 with captions" in said
    assert (run / "concept.safetensors").read_bytes() == whole
