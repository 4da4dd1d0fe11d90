"""The converted copy of a base model: kept, read instead of the files, and only while it is theirs and whole."""

import os
import shutil
from pathlib import Path

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


def same(a: pipeline.BasePipeline, b: pipeline.BasePipeline):
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


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_copy_is_made_again(model, conversions, tmp_path, caplog):
    """One flipped bit in any of its files is found."""
    first = tiny.load(model)
    (copy,) = copies(tmp_path)
    names = sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    assert Path(weight_cache.FACTS) in names
    for count, name in enumerate(names, 2):
        flip(copy / name)
        caplog.clear()
        same(tiny.load(model), first)
        assert "the converted copy is damaged" in caplog.text
        assert len(conversions) == 3 * count
        if count > 4:
            break
    same(tiny.load(model), first)
    assert len(conversions) == 3 * count


@pytest.mark.parametrize("change", ["empty", "removed", "added", "facts"])
def test_files_that_changed(model, conversions, tmp_path, caplog, change):
    first = tiny.load(model)
    (copy,) = copies(tmp_path)
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if change == "empty":
        largest.write_bytes(b"")
    elif change == "removed":
        largest.unlink()
    elif change == "added":
        (largest.parent / "x").write_bytes(b"x")
    else:
        (copy / weight_cache.FACTS).write_text("[" * 100_000)
    same(tiny.load(model), first)
    assert "the converted copy is damaged" in caplog.text
    assert len(conversions) == 6
    assert copies(tmp_path) == [copy]
    assert not list(copy.parent.glob(".*"))


def test_processes_that_start_together(model, tmp_path, caplog, monkeypatch):
    """The slower one finds the other's copy in its place, and leaves it there."""
    keep = weight_cache.keep

    def slower(folder, *kept):
        keep(folder, *kept)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        keep(folder, *kept)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    monkeypatch.setattr(weight_cache, "keep", slower)
    first = tiny.load(model)
    same(tiny.load(model), first)
    assert not caplog.text
    assert [path.name for path in copies(tmp_path)[0].parent.iterdir()] == [copies(tmp_path)[0].name]


def test_an_unfinished_copy_is_not_read_and_removed_in_the_end(model, conversions, tmp_path):
    tiny.load(model)
    (copy,) = copies(tmp_path)
    left = copy.rename(copy.parent / f".{copy.name}-0")
    tiny.load(model)
    assert len(conversions) == 6
    assert left.exists()
    os.utime(left, (0, 0))
    shutil.rmtree(copy)
    tiny.load(model)
    assert not left.exists()


def test_the_folder_is_ours_alone(model, conversions, tmp_path, caplog):
    first = tiny.load(model)
    (copy,) = copies(tmp_path)
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    copy.parent.chmod(0o770)
    same(tiny.load(model), first)
    assert "no converted copy kept: others may write there; chmod go-w" in caplog.text
    copy.parent.chmod(0o755)
    tiny.load(model)
    assert len(conversions) == 6


def test_where_no_copy_can_be_kept(model, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where a folder should be")
    tiny.load(model)
    assert "no converted copy kept" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("SMALLEST", 2**28), ("WORTH", 1.5)])
def test_a_model_for_which_it_would_not_pay_has_none(model, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(weight_cache, name, value)
    tiny.load(model)
    assert not (tmp_path / "cache").exists()
