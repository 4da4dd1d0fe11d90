"""The converted copy of a base model: kept, read instead of the files, and only while it is theirs and whole."""

import jax
import numpy as np
import pytest

from catversion_jax.base import pipeline
from catversion_jax.weights import weight_cache
from tests import tiny


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_cache, "SMALLEST", 0)
    monkeypatch.setattr(weight_cache, "WORTH", 0)
    return tiny.write(tmp_path / "model")


@pytest.fixture
def conversions(monkeypatch):
    """The components that were converted, in order."""
    done = []
    begin = pipeline.begin
    monkeypatch.setattr(
        pipeline, "begin", lambda pool, source, name, *rest: done.append(name) or begin(pool, source, name, *rest)
    )
    return done


def copies(tmp_path):
    return sorted((tmp_path / "cache" / "catversion_jax" / "models").iterdir())


def same(a: pipeline.Pipeline, b: pipeline.Pipeline):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_start_reads_the_copy(model, conversions, tmp_path, dtype):
    first = tiny.load(model, dtype=dtype)
    assert conversions == ["unet", "vae", "text"]
    same(tiny.load(model, dtype=dtype), first)
    assert len(conversions) == 3
    assert len(copies(tmp_path)) == 1


def test_a_copy_is_of_one_dtype_and_of_these_files(model, conversions, tmp_path):
    first = tiny.load(model)
    assert tiny.load(model, dtype="bfloat16").params["unet"]["conv_in"]["kernel"].dtype == "bfloat16"
    tiny.write(tmp_path / "model", seed=1)
    assert tiny.load(model).fingerprint != first.fingerprint
    assert len(conversions) == 9
    assert len(copies(tmp_path)) == 3


def test_a_damaged_copy_is_made_again(model, conversions, tmp_path, caplog):
    first = tiny.load(model)
    (copy,) = copies(tmp_path)
    facts = copy / weight_cache.FACTS
    facts.write_text(facts.read_text().replace('"digest": "', '"digest": "x'))
    same(tiny.load(model), first)
    assert "the converted copy is damaged" in caplog.text
    for path in (copy / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    same(tiny.load(model), first)
    assert len(conversions) == 9
    same(tiny.load(model), first)
    assert len(conversions) == 9


def test_where_no_copy_can_be_kept(model, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    tiny.load(model)
    assert "no converted copy kept" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("SMALLEST", 2**28), ("WORTH", 1.5)])
def test_a_model_for_which_it_would_not_pay_has_none(model, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(weight_cache, name, value)
    tiny.load(model)
    assert not (tmp_path / "cache").exists()
