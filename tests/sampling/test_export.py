"""catversion export: what is written, without PyTorch; what it does there is tested in parity/test_export.py."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from catversion_jax.methods import concept_file
from catversion_jax.sampling import conditioning, export
from tests import tiny
from tests.commands import catversion, error_of

CONCEPTS = ("teapot.safetensors", f"{export.MODELS}/teapot.safetensors")
PROMPTS = ["a photo of a teapot on the beach", "a car"]


@pytest.fixture(scope="module")
def concept(tiny_model, tiny_pipeline) -> concept_file.Concept:
    prefix = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 16)).astype(np.float32)
    fingerprint = tiny_pipeline.fingerprint
    return tiny.concept(prefix, fingerprint, tiny_model, logit_bias=1.0, scope="trigger")


@pytest.fixture(scope="module")
def source(concept, tmp_path_factory):
    """A run's folder, as far as export looks at it."""
    folder = tmp_path_factory.mktemp("run")
    tiny.save_run(folder / concept_file.FILE_NAME, concept)
    return folder


def written(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_prompts(concept, source, tiny_pipeline, tmp_path):
    out = tmp_path / "out"
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    done = catversion(
        "export", "--embedding", source, "--out", out, *prompts, "--strength=0.5", "--negative_prompt=ugly"
    )
    assert (
        done.stderr.count("warning: without the class word 'teapot', which the concept was learned with: 'a car'") == 1
    )
    assert written(out) == {export.EMBEDS, *export.FILES, *CONCEPTS}

    def states(prompts, strength):
        return conditioning.condition(tiny_pipeline, prompts, concept.at(strength)).states

    arrays = load_file(out / export.EMBEDS)
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        "prompt_embeds": ((2, 77, 32), np.float32),
        "negative_prompt_embeds": ((2, 77, 32), np.float32),
    }
    np.testing.assert_allclose(arrays["prompt_embeds"], states(PROMPTS, 0.5), atol=1e-5)
    np.testing.assert_allclose(arrays["negative_prompt_embeds"], states(["ugly", "ugly"], 0.0), atol=1e-5)
    assert np.abs(arrays["prompt_embeds"][0] - states(PROMPTS, 0.0)[0]).max() > 0.01
    assert concept_file.load(out / "teapot.safetensors").strength == 0.5
    with safe_open(out / export.EMBEDS, framework="numpy") as file:
        assert {name: json.loads(value) for name, value in file.metadata().items()} == {
            "prompts": PROMPTS,
            "negative_prompt": "ugly",
            "strength": 0.5,
            "class_word": "teapot",
            "model_path": Path(concept.model_path).name,
        }


def test_without_a_prompt_no_model_is_needed(concept, tmp_path):
    path, out = tmp_path / "c.safetensors", tmp_path / "out"
    concept_file.save(path, dataclasses.replace(concept, model_path="nowhere"))
    for _ in range(2):  # a second export replaces the first
        catversion("export", "--embedding", path, "--out", out)
        assert written(out) == {*export.FILES, *CONCEPTS}
    for name in CONCEPTS:
        again = concept_file.load(out / name)
        np.testing.assert_array_equal(again.learned["prefix"], concept.learned["prefix"])
        assert dataclasses.replace(again, learned={}) == dataclasses.replace(concept_file.load(path), learned={})
    for name, data in export.FILES.items():
        assert (out / name).read_bytes() == (export.FOLDER / data).read_bytes()
    assert "learned on 'nowhere', a local model; give its path as --model" in error_of(
        "export", "--embedding", path, "--out", out, "--prompt=a teapot"
    )


def test_several(source, concept, tmp_path):
    """Each under its class word, or with its digest if others have that too; text states hold one."""
    other = dataclasses.replace(concept, class_word="café au lait", learned={"prefix": concept.learned["prefix"][:1]})
    twin = dataclasses.replace(concept, learned={"prefix": concept.learned["prefix"][1:]})
    given = ["--embedding", source]
    for i, each in enumerate((other, twin)):
        concept_file.save(tmp_path / f"{i}.safetensors", each)
        given += ["--embedding", tmp_path / f"{i}.safetensors"]
    done = catversion("export", *given, "--out", tmp_path / "out")
    names = [f"teapot-{concept.digest[:8]}", "café-au-lait", f"teapot-{twin.digest[:8]}"]
    assert done.stdout.startswith(", ".join(f"{name}.safetensors" for name in names))
    for name, expected in zip(names, (concept, other, twin), strict=True):
        assert concept_file.load(tmp_path / "out" / export.MODELS / f"{name}.safetensors").digest == expected.digest
    refused = error_of("export", *given, "--out", tmp_path / "no", "--prompt=a teapot")
    assert "--prompt: text states hold one concept, not 3; export each by itself" in refused
    assert not (tmp_path / "no").exists()


def test_refuses(source, tmp_path):
    out = tmp_path / "out"
    assert "--embedding: missing" in error_of("export", "--out", out)
    assert "twice; expected each concept once" in error_of("export", *["--embedding", source] * 2, "--out", out)
    assert "--out: missing" in error_of("export", "--embedding", source)
    assert "not found; expected a learned concept" in error_of("export", "--embedding", tmp_path / "no", "--out", out)
    nowhere = ["--embedding", source, "--out", out, f"--prompts_file={tmp_path / 'nowhere.txt'}"]
    assert "--prompts_file takes a text file" in error_of("export", *nowhere)
    assert not out.exists()
    other = tiny.write(tmp_path / "other", seed=1)
    arguments = ["--embedding", source, "--out", out, "--prompt=a teapot", f"--model={other}"]
    assert "learned in text encoder" in error_of("export", *arguments)
    assert not written(out)
    (tmp_path / "file").write_text("")
    assert "--out takes a folder" in error_of("export", "--embedding", source, "--out", tmp_path / "file")


def test_files_for_others_are_data():
    """In no package, so nothing imports them; and self-contained: no file names another module of this project."""
    assert not (export.FOLDER / "__init__.py").exists()
    assert {path.name for path in export.FOLDER.iterdir() if path.is_file()} == set(export.FILES.values())
    for path in export.FOLDER.glob("*.py"):
        assert "catversion_jax" not in path.read_text()


def test_text_states_that_are_not_finite(concept, tmp_path):
    """Are not written: another program would draw black images with them."""
    path, out = tmp_path / "c.safetensors", tmp_path / "out"
    huge = {"prefix": np.full_like(concept.learned["prefix"], 3e38)}
    tiny.save_run(path, dataclasses.replace(concept, learned=huge))
    refused = error_of("export", "--embedding", path, "--out", out, "--prompt=a teapot")
    assert "the text encoder gives NaN or infinity" in refused
    assert not (out / export.EMBEDS).exists()
