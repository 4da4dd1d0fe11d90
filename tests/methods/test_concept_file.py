"""concept.safetensors: what goes in comes out, and what is no concept is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods import concept_file
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel
from catversion_jax.utils.errors import UserError
from tests.commands import ROOT


@pytest.fixture
def concept() -> concept_file.Concept:
    prefix = np.random.default_rng(0).normal(size=(4, 3, 2, 5, 32)).astype(np.float32)
    method = CatVersion(((9, 10, 11),), logit_bias=1.0)
    return concept_file.Concept(
        {"prefix": prefix}, method, "teapot", ("a photo of {concept}",), "0123", "/models/sd15", 300, 0.01, 7
    )


def test_round_trip(tmp_path, concept):
    concept_file.save(tmp_path / concept_file.FILE_NAME, concept)
    for path in (tmp_path, tmp_path / concept_file.FILE_NAME):
        again = concept_file.load(path)
        np.testing.assert_array_equal(again.learned["prefix"], concept.learned["prefix"])
        assert dataclasses.replace(again, learned={}) == dataclasses.replace(concept, learned={}, model_path="sd15")
    assert list(load_file(tmp_path / concept_file.FILE_NAME)) == ["prefix"]
    assert [path.name for path in tmp_path.iterdir()] == [concept_file.FILE_NAME]


def test_the_strength(tmp_path, concept):
    """It is recorded; a file of before it was means 1. `at` keeps it unless another one is given."""
    path = tmp_path / concept_file.FILE_NAME
    concept_file.save(path, concept.at(0.5))
    stored = concept_file.load(path)
    assert (stored.strength, stored.at(None).strength, stored.at(2.0).strength) == (0.5, 0.5, 2.0)
    tensors, metadata = load_file(path), dict(safe_open(path, framework="numpy").metadata())
    del metadata["strength"], metadata["digest"]
    save_file(tensors, path, metadata)
    assert concept_file.load(path).strength == 1


def test_the_samplers_settings(tmp_path, concept):
    """Scheduler, steps and guidance are recorded; how many images at once is the machine's. A file without is read."""
    path = tmp_path / "a.safetensors"
    concept_file.save(path, dataclasses.replace(concept, sampler=SamplerConfig(20, 3.0, 16, "ddim")))
    assert concept_file.load(path).sampler == SamplerConfig(20, 3.0, SamplerConfig.batch_size, "ddim")
    concept_file.save(path, concept)
    assert concept_file.load(path).sampler is None


def test_wrong_model(concept, tiny_pipeline):
    text = CLIPTextConfig(hidden_size=160, num_attention_heads=5)
    networks = dataclasses.replace(tiny_pipeline.networks, text=(CLIPTextModel(text),))
    assert concept_file.check_model(concept, "0123", networks, "OUT", "model") == []
    with pytest.raises(UserError, match="OUT: learned in text encoder 0123, but model has 4567"):
        concept_file.check_model(concept, "4567", networks, "OUT", "model")


def rewritten(path, concept, prefix=None, **metadata):
    concept_file.save(path, concept)
    kept = {name: value for name, value in concept.metadata().items() if name not in concept_file.OPTIONAL}
    fields = {name: json.dumps(value) for name, value in kept.items()} | {"format_version": "1"}
    fields = {k: v for k, v in (fields | metadata).items() if v is not None}
    save_file({"prefix": concept.learned["prefix"] if prefix is None else prefix}, path, fields)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "2"}, "format version 2; this program reads version 1"),
        ({"format_version": None}, "tensors prefix of another program; expected a concept of catversion train"),
        ({"format_version": "99"}, "format version 99; this program reads version 1; update it"),
        ({"seed": "4294967296"}, "seed 4294967296, steps 300; expected those of a run"),
        ({"steps": "-5"}, "seed 7, steps -5; expected those of a run"),
        ({"model_path": '"~nosuchuser/x"'}, "model_path '~nosuchuser/x'; expected a model's name"),
        ({"model_path": '"a\\u0000b"'}, "class_word or model_path with a NUL"),
        ({"class_word": None}, "metadata missing or unknown: class_word"),
        ({"more": '"x"'}, "metadata missing or unknown: more"),
        ({"sampler": '{"steps": 20}'}, "metadata missing or unknown: guidance, scheduler"),
        (
            {"sampler": '{"steps": 0, "guidance": 3.0, "scheduler": ""}'},
            "sampler.steps=0; expected 1 to 1000",
        ),
        ({"strength": "2.5"}, "strength 2.5; expected 0 to 2"),
        ({"strength": "-1"}, r"strength -1.0; expected 0 to 2"),
        ({"strength": '"1"'}, "Expected `float`, got `str`"),
        ({"scope": '"sometimes"'}, "scope 'sometimes'; expected one of all, trigger"),
        ({"layers": "[11, 9, 10]"}, r"layers \[11, 9, 10\]; expected indices that ascend"),
        ({"layers": "[9, 10]"}, r"prefix float32 \[4, 3, 2, 5, 32\]; expected float32 \[P, 2, 2, heads, head_dim\]"),
        ({"layers": "[9, 10"}, "metadata layers: not JSON"),
        ({"layers": "9"}, "expected a concept of format 1"),
        ({"layers": '["9", "10", "11"]'}, "Expected `int`, got `str`"),
        ({"layers": "[[9], [10], [11]]"}, "Expected `int`, got `array`"),
        ({"class_word": "[" * 10_000}, "metadata class_word: nested too deeply"),
        ({"class_word": '"\\ud800"'}, "metadata class_word: not JSON"),
        ({"class_word": "7"}, "Expected `str`, got `int`"),
        ({"templates": '"a {concept}"'}, "Expected `array`, got `str`"),
        ({"learning_rate": "NaN"}, "metadata learning_rate: not JSON"),
        ({"seed": "{}"}, "Expected `int`, got `object`"),
        ({"method": "[1]"}, "of an unknown method"),
        ({"method": '{"a": 1}'}, "of an unknown method"),
        ({"templates": json.dumps(["a" * 2**20])}, "metadata of more than"),
        ({"sampler": "[]"}, "sampler \\[\\]; expected an object"),
        ({"digest": '"0123"'}, "damaged: its contents are not those that were written"),
        ({"templates": "9"}, "expected a concept of format 1"),
        ({"logit_bias": '"x"'}, "expected a concept of format 1"),
        ({"method": '"lora"'}, "of an unknown method; expected one of catversion, textual_inversion"),
        ({"method": '"dreambooth"'}, "metadata missing or unknown: identifier, layers"),
        ({"prefix": np.zeros((4, 3, 2, 5, 32), np.float16)}, "prefix float16"),
        ({"prefix": np.zeros(7, np.float32)}, r"prefix float32 \[7\]"),
    ],
)
def test_refused(tmp_path, concept, change, message):
    path = rewritten(tmp_path / "c.safetensors", concept, **change)
    with pytest.raises(UserError, match=message) as error:
        concept_file.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit(tmp_path, concept):
    """Anywhere in the file, is noticed; a file from before there were digests is read."""
    path = tmp_path / "c.safetensors"
    concept_file.save(path, concept)
    whole = path.read_bytes()
    rng, noticed = np.random.default_rng(0), 0
    places = [*range(0, 600, 7), *rng.integers(600, len(whole), 60)]
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            again = concept_file.load(path)
        except UserError:
            noticed += 1
        else:  # a bit of the padding
            assert dataclasses.replace(again, learned={}) == dataclasses.replace(concept, learned={}, model_path="sd15")
            np.testing.assert_array_equal(again.learned["prefix"], concept.learned["prefix"])
    assert noticed >= len(places) - 3
    assert concept_file.load(rewritten(path, concept)).class_word == "teapot"


def test_equal_concepts_give_equal_files(tmp_path, concept):
    """In another process too, where hashes have other seeds."""
    concept_file.save(tmp_path / "a.safetensors", concept)
    code = (
        "import sys; from pathlib import Path; from catversion_jax.methods import concept_file as f;"
        "f.save(Path(sys.argv[2]), f.load(sys.argv[1]))"
    )
    for name in ("b", "c"):
        other = tmp_path / f"{name}.safetensors"
        subprocess.run([sys.executable, "-c", code, tmp_path / "a.safetensors", other], cwd=ROOT, check=True)
        assert other.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, concept, value):
    prefix = concept.learned["prefix"].copy()
    prefix[0, 0, 0, 0, 3] = value
    path = rewritten(tmp_path / "c.safetensors", concept, prefix)
    with pytest.raises(UserError, match="prefix holds NaN or infinity"):
        concept_file.load(path)


ONE = np.zeros((4, 768), np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "kind"),
    [
        ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": ONE}, {"format_version": "1"}, "a LoRA"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": ONE}, {}, "a LoRA"),
        ({"unet.up_blocks.1.attentions.0.to_q.lora.down.weight": ONE}, {}, "a LoRA"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": ONE}, {}, "a LoRA"),
        ({"lora_unet_mid.hada_w1_a": ONE}, {}, "a LyCORIS adapter"),
        ({"control_model.input_blocks.0.0.weight": ONE}, {}, "a ControlNet"),
        ({"model.diffusion_model.out.2.weight": ONE}, {}, "a whole model, for --model"),
        ({"down_blocks.0.resnets.0.conv1.weight": ONE}, {}, "a UNet of diffusers"),
        ({"encoder.conv_in.weight": ONE}, {}, "a VAE of diffusers"),
        ({"to_k_custom_diffusion.weight": ONE}, {}, "Custom Diffusion's weights of diffusers"),
        ({"down_blocks.0.motion_modules.0.norm.weight": ONE}, {}, "a motion module of AnimateDiff"),
        ({"768.0.linear.weight": ONE}, {}, "a hypernetwork"),
        ({"foo": ONE, "bar": ONE}, {}, "tensors bar, foo of another program"),
        ({"text_model.embeddings.token_embedding.weight": ONE}, {}, "a CLIP of transformers"),
    ],
)
def test_files_of_other_programs(tmp_path, tensors, metadata, kind):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=f"other.safetensors: {kind}; expected a concept of catversion train"):
        concept_file.load(path)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PK\3\4", "cut short or damaged"),
        (b"\x80\x02}q\0", "a pickle, which is never opened"),
        (b"\x89PNG", "a picture"),
    ],
)
def test_other_files(tmp_path, start, kind):
    path = tmp_path / "embedding.pt"
    path.write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=f"embedding.pt: {kind}"):
        concept_file.load(path)


@pytest.mark.parametrize(
    ("model", "recorded"),
    [
        ("", ""),
        ("owner/model", "owner/model"),
        ("/models/sd15", "sd15"),
        ("./models/sd15", "sd15"),
        ("~/sd15.safetensors", "sd15.safetensors"),
    ],
)
def test_the_persons_paths_stay_at_home(tmp_path, concept, model, recorded):
    """A file names a local model by its last part; in its run's folder, or a batch's, the path is found again."""
    folder = tmp_path / "batch" / "teapot"
    folder.mkdir(parents=True)
    concept_file.save(folder / concept_file.FILE_NAME, dataclasses.replace(concept, model_path=model))
    assert concept_file.load(folder).model_path == recorded
    assert recorded == model or model.encode() not in (folder / concept_file.FILE_NAME).read_bytes()
    for run in (tmp_path / "batch", folder):
        (run / "config.json").write_text(json.dumps({"model.path": model}))
        assert concept_file.load(folder).model_path == model
        (run / "config.json").write_text(json.dumps({"model.path": "/models/another"}))
        assert concept_file.load(folder).model_path == recorded
        (run / "config.json").write_text("[")
        assert concept_file.load(folder).model_path == recorded


def test_truncated_missing_and_huge(tmp_path, concept, monkeypatch):
    path = tmp_path / "c.safetensors"
    concept_file.save(path, concept)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable concept"):
        concept_file.load(path)
    with pytest.raises(UserError, match="not found; expected a learned concept"):
        concept_file.load(tmp_path / "nothing")
    with path.open("wb") as file:
        file.truncate(concept_file.MAX_BYTES + 1)
    with pytest.raises(UserError, match="not a readable concept"):
        concept_file.load(path)
    concept_file.save(path, concept)
    monkeypatch.setattr(concept_file, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="expected a concept of a few kilobytes"):
        concept_file.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, concept, monkeypatch):
    path = tmp_path / concept_file.FILE_NAME
    concept_file.save(path, concept)
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("catversion_jax.weights.safetensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        concept_file.save(path, concept)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_who_may_read_it(tmp_path, concept):
    """Whom the umask lets: the library that writes the file makes it for its owner alone."""
    before = os.umask(0o027)
    try:
        concept_file.save(tmp_path / "a.safetensors", concept)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "learned_embeds.safetensors"])
def test_folders_of_other_programs(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"this is a (LoRA|Textual Inversion).*expected a learned concept"):
        concept_file.load(tmp_path)
