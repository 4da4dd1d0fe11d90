"""Shared by the tests of sampling: two concepts as files."""

import dataclasses

import numpy as np
import pytest

from catversion_jax.methods import concept_file
from tests import tiny


@pytest.fixture(scope="module")
def concepts(tiny_model, tiny_pipeline, tmp_path_factory) -> list:
    """The folders of a teapot and a dog, learned on the tiny model."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("concepts")
    for word in ("teapot", "dog"):
        prefix = 3 * rng.normal(size=(2, 3, 2, 2, 16)).astype(np.float32)
        concept = tiny.concept(prefix, tiny_pipeline.fingerprint, model=tiny_model, scope="trigger")
        (folder / word).mkdir()
        concept = dataclasses.replace(concept, class_word=word, strength=0.7, model_path=str(tiny_model))
        tiny.save_run(folder / word / "concept.safetensors", concept)
    return [folder / "teapot", folder / "dog"]


@pytest.fixture(scope="module")
def loaded(concepts) -> list:
    """The same two, loaded, at full strength."""
    return [concept_file.load(folder).at(1.0) for folder in concepts]
