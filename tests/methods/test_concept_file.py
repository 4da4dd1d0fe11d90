"""concept.safetensors: what goes in comes out, and what is no concept is refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods import concept_file
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel
from catversion_jax.utils.errors import UserError


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
        assert dataclasses.replace(again, learned={}) == dataclasses.replace(concept, learned={})
    assert list(load_file(tmp_path / concept_file.FILE_NAME)) == ["prefix"]
    assert [path.name for path in tmp_path.iterdir()] == [concept_file.FILE_NAME]


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
        ({"format_version": None}, "format version None"),
        ({"class_word": None}, "metadata missing or unknown: class_word"),
        ({"more": '"x"'}, "metadata missing or unknown: more"),
        ({"sampler": '{"steps": 20}'}, "metadata missing or unknown: guidance, scheduler"),
        (
            {"sampler": '{"steps": 0, "guidance": 3.0, "scheduler": ""}'},
            "sampler.steps=0; expected 1 to 1000",
        ),
        ({"scope": '"sometimes"'}, "scope 'sometimes'; expected one of all, trigger"),
        ({"layers": "[11, 9, 10]"}, r"layers \[11, 9, 10\]; expected indices that ascend"),
        ({"layers": "[9, 10]"}, r"prefix float32 \[4, 3, 2, 5, 32\]; expected float32 \[P, 2, 2, heads, head_dim\]"),
        ({"layers": "[9, 10"}, "not a readable concept"),
        ({"layers": "9"}, "expected a concept of format 1"),
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
