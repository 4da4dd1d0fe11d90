"""`catversion convert`: the authors' adapters become concepts and come back with the same numbers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.methods import concept_file, official
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel
from catversion_jax.utils.errors import UserError
from catversion_jax.weights import torch_zip
from tests.commands import catversion, error_of
from tests.conftest import OFFICIAL, needs_official
from tests.torch_files import Call, Global, View, save, whole

SD15 = CLIPTextConfig()


def concept(length: int = 1) -> concept_file.Concept:
    """One that the authors' format can hold."""
    prefix = np.random.default_rng(0).normal(size=(length, *official.SHAPE)).astype(np.float32)
    unknown = {"fingerprint": "", "model_path": "", "steps": 0, "learning_rate": 0.0, "seed": 0}
    return concept_file.Concept({"prefix": prefix}, official.FIXED, "", (), **unknown)


@pytest.mark.parametrize("length", [1, 4])
def test_there_and_back(tmp_path, length):
    ours = concept(length)
    path = tmp_path / "adapter.bin"
    official.write_adapter(path, ours, Path("OUT"))
    tensors = torch_zip.open_checkpoint(path)
    assert tuple(tensors) == official.NAMES
    assert len(set(tensors.values())) == 1  # one storage
    again = official.read_adapter(path, "bear")
    assert again.learned["prefix"].tobytes() == ours.learned["prefix"].tobytes()
    assert dataclasses.replace(again, learned={}) == dataclasses.replace(ours, learned={}, class_word="bear")
    before = path.read_bytes()
    official.write_adapter(path, again, Path("OUT"))
    assert path.read_bytes() == before


@needs_official
@pytest.mark.parametrize("name", ["teddybear", "colorful_teapot"])
def test_the_authors_adapters(tmp_path, name):
    theirs = OFFICIAL / name / "pytorch_adapter.bin"
    catversion("convert", theirs, tmp_path / "OUT", "--class_word=bear")
    ours = concept_file.load(tmp_path / "OUT")
    assert ours.learned["prefix"].shape == (1, 3, 2, 12, 64)
    assert (ours.class_word, ours.method) == ("bear", CatVersion(((9, 10, 11),), logit_bias=1.0, scope="all"))
    assert 0.5 < ours.learned["prefix"].std() < 2  # learned from N(0, 1)
    catversion("convert", tmp_path / "OUT", tmp_path / "back.bin")
    back, original = (torch_zip.open_checkpoint(path) for path in (tmp_path / "back.bin", theirs))
    assert back.keys() == original.keys()
    for key in back:
        assert back[key].read().tobytes() == original[key].read().tobytes()


def adapter(path: Path, names=official.NAMES, **tensors) -> Path:
    """An adapter of zeros, with some of its tensors changed."""
    numbers = np.zeros(9216, np.float32)
    flat = View("0", np.float32, 9216, (4608,), (1,))
    return save(path, dict.fromkeys(names, flat) | tensors, {"0": numbers, "1": numbers})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": official.NAMES[1:]}, "expected an authors' adapter, 4 tensors named ..."),
        ({"more": View("0", np.float32, 9216, (4608,), (1,))}, "expected an authors' adapter"),
        ({"names": (), "weight": whole("0", np.zeros(9216, np.float32))}, "expected an authors' adapter"),
        ({official.NAMES[0]: View("1", np.float32, 9216, (4608,), (1,))}, "by all names"),
        ({official.NAMES[0]: View("0", np.float32, 9216, (4608,), (1,), 1)}, "by all names"),
        ({official.NAMES[0]: 3}, "P x 4608 numbers by all names"),
        (dict.fromkeys(official.NAMES, View("0", np.float32, 9216, (4607,), (1,))), "P x 4608 numbers"),
        (dict.fromkeys(official.NAMES, View("0", np.float32, 9216, (0,), (1,))), "P x 4608 numbers"),
        (dict.fromkeys(official.NAMES, View("0", np.float32, 9216, (6, 768), (768, 1))), "one flat float32 tensor"),
        (dict.fromkeys(official.NAMES, View("0", np.int64, 4608, (4608,), (1,))), "one flat float32 tensor"),
        ({official.NAMES[0]: Call(Global("posix", "system"), ("touch PWNED",))}, "refers to 'posix.system'"),
        ({official.NAMES[0]: {Global("os", "x"): 1}}, "refers to 'os.x'; expected tensors alone; do not trust"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    path = adapter(tmp_path / "bad.bin", **changes)
    with pytest.raises(UserError) as error:
        official.read_adapter(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ((8, 9, 10),)}, r"layers \(8, 9, 10\) \(only \(9, 10, 11\)\)"),
        ({"logit_bias": 0.0, "scope": "trigger"}, r"logit_bias 0.0 \(only 1.0\), scope trigger \(only all\)"),
        ({"layers": ((9, 10, 11), (29, 30))}, r"layers_2 \(29, 30\) \(only None\)"),
        ({"prefix": np.zeros((2, 3, 2, 5, 32), np.float32)}, r"\['P', 3, 2, 5, 32\] \(only \['P', 3, 2, 12, 64\]\)"),
    ],
)
def test_what_the_authors_format_cannot_hold(tmp_path, changes, message):
    learned = {name: changes.get(name, array) for name, array in concept().learned.items()}
    method = dataclasses.replace(official.FIXED, **{key: x for key, x in changes.items() if key not in learned})
    changed = dataclasses.replace(concept(), learned=learned, method=method)
    with pytest.raises(UserError, match=rf"OUT: the authors' format cannot hold (prefix )?{message}"):
        official.write_adapter(tmp_path / "adapter.bin", changed, Path("OUT"))
    assert list(tmp_path.iterdir()) == []


def test_a_concept_that_does_not_tell_its_model(tiny_pipeline):
    imported = concept()

    def check(text: CLIPTextConfig, model: str) -> list[str]:
        networks = dataclasses.replace(tiny_pipeline.networks, text=(CLIPTextModel(text),))
        return concept_file.check_model(imported, "4567", networks, "OUT", model)

    (warning,) = check(SD15, "sd15")
    assert warning == "OUT does not tell its base model; the shapes fit sd15, and nothing else was compared"
    misfit = r"OUT: .* \[12, 64\] in layers \[9, 10, 11\], but the text encoder has .* \(other\)"
    for wrong in ({"hidden_size": 1536}, {"num_attention_heads": 8}, {"num_hidden_layers": 11}):
        with pytest.raises(UserError, match=misfit):
            check(dataclasses.replace(SD15, **wrong), "other")


def test_mistakes_in_the_command(tmp_path):
    path = tmp_path / "adapter.bin"
    official.write_adapter(path, concept(), tmp_path)
    out = tmp_path / "deep" / "teddy.safetensors"
    assert f"{out}: a prefix of length 1 in layers 9, 10, 11" in catversion("convert", path, out).stdout
    assert f"{out}: exists already" in error_of("convert", path, out)
    assert f"{path}: exists already" in error_of("convert", out, path)
    assert "--class_word: an authors' adapter cannot" in error_of("convert", out, tmp_path / "new", "--class_word=x")
    assert "convert: 1 arguments; expected 2: SOURCE TARGET" in error_of("convert", path)
    assert f"{tmp_path / 'nothing'}: not found" in error_of("convert", tmp_path / "nothing", tmp_path / "x")
    assert "catversion convert SOURCE TARGET [--FLAG=VALUE ...]: " in catversion("convert", "--help").stdout


def test_generate_with_an_imported_concept(tiny_pipeline, tiny_model, tmp_path):
    """It draws after one warning where the shapes fit, and refuses it if they do not."""
    clip = tiny_pipeline.networks.text[0].config
    prefix = np.zeros((1, 3, 2, *clip.heads), np.float32)
    method = dataclasses.replace(official.FIXED, layers=((1, 2, 3),))
    fits = dataclasses.replace(concept(), learned={"prefix": prefix}, method=method)
    concept_file.save(tmp_path / "fits.safetensors", fits)
    arguments = ["generate", "--prompt=a teapot", "--num=1", "--steps=1", f"--out={tmp_path}"]
    model = f"--model={tiny_model}"
    done = catversion(*arguments, model, f"--embedding={tmp_path / 'fits.safetensors'}")
    assert done.stderr.count("catversion: warning: ") == 1
    assert "does not tell its base model" in done.stderr
    concept_file.save(tmp_path / "sd15.safetensors", concept())
    message = error_of(*arguments, model, f"--embedding={tmp_path / 'sd15.safetensors'}")
    assert "[12, 64] in layers [9, 10, 11]" in message
    assert message.endswith("give the base model it was learned on")
