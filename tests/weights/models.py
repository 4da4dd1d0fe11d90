"""Narrowed models written as other libraries write them, and what a source must give for them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from catversion_jax.base import pipeline
from catversion_jax.utils.errors import UserError
from catversion_jax.weights import source, weight_files
from catversion_jax.weights.conversion import from_torch
from tests import ldm_files


def write_configs(folder: Path, family: str) -> Path:
    for component, config in ldm_files.CONFIGS[family].items():
        part = folder / source.FOLDERS[component]
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(config))
    shutil.copytree(pipeline.MINI / "scheduler", folder / "scheduler")
    shutil.copytree(pipeline.MINI / "tokenizer", folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    return folder


def weights_file(folder: Path, component: str, kind: int, variant: str = "") -> Path:
    """Where a library saves a component's weights; `kind` counts weight_files.FORMATS."""
    form = weight_files.FORMATS[kind]
    stem = form.stems[component in ("unet", "vae")]
    return folder / source.FOLDERS[component] / f"{stem}{variant}.{form.extension}"


def write_folder(folder: Path, tensors: dict, family: str = "sd1", variant: str = "") -> Path:
    write_configs(folder, family)
    for component, values in tensors.items():
        save_file(values, weights_file(folder, component, 0, variant))
    return folder


def read(opened: source.Source, component: str) -> dict:
    rules, tensors = opened.rules(component), opened.tensors(component)
    if rules is None:
        return unflatten_dict({name: tensor.read() for name, tensor in tensors.items()}, sep="/")
    return from_torch(tensors, rules, ldm_files.shapes(component, opened.config(component)), opened.name)


def assert_same(opened: source.Source, params: dict):
    assert set(opened.components) == params.keys()
    for component, expected in params.items():
        actual = read(opened, component)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def refused(*expected: str, **arguments: str) -> str:
    with pytest.raises(UserError) as error:
        source.open_source(**arguments)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message
    return message


def without(tensors: dict, *prefixes: str) -> dict:
    return {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
