"""Accuracies by the nearest caption, on the mini model's own world."""

import json

import numpy as np
import pytest

from catversion_jax.base.pipeline import MINI
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.study import accuracy
from catversion_jax.utils.errors import UserError

TEAPOT = ConceptFolder(MINI.parent / "concepts" / "teapot")


class Captions:
    """A text encoder whose embeddings are unit vectors, one for each caption; `image` gives those of captions."""

    def __init__(self):
        self.known: dict[str, int] = {}

    def text(self, captions):
        index = [self.known.setdefault(caption, len(self.known)) for caption in captions]
        return np.eye(256, dtype=np.float32)[index]


def hits(template: str, *shown: str) -> dict[str, list[float]]:
    """The accuracies of images that lie at these captions, and nearest to the first one."""
    clip = Captions()
    embeddings = sum(0.9**i * clip.text([caption]) for i, caption in enumerate(shown))
    found = accuracy.hits(accuracy.read_world(MINI), clip.text, TEAPOT, template, embeddings)
    return {name: values.tolist() for name, values in found.items()}


def test_a_place():
    template = "a photo of {concept} on the beach"
    assert hits(template, "a photo of a teapot on the beach", "a photo of a teapot") == {"class": [1], "place": [1]}
    assert hits(template, "a photo of a teapot in the snow", "a photo of a mug") == {"class": [0], "place": [0]}


def test_a_colour():
    template, blue = "a photo of a blue {class_word}", "a photo of a blue teapot"
    both = {"class": [1], "colour": [1], "colour_and_class": [1]}
    assert hits(template, blue, "a photo of a teapot") == both
    assert hits(template, blue, "a photo of a whale") == both | {"class": [0], "colour_and_class": [0]}
    pink = hits(template, "a photo of a pink teapot", blue, "a photo of a teapot")
    assert pink == both | {"colour": [0], "colour_and_class": [0]}


def test_an_accessory():
    """It is worn if "wearing a hat" is nearer than nothing and than sunglasses."""
    template, hat, plain = (
        "a photo of {concept} wearing a hat",
        "a photo of a teapot wearing a hat",
        "a photo of a teapot",
    )
    both = {"class": [1], "accessory": [1], "accessory_and_class": [1]}
    assert hits(template, hat, plain) == both
    assert hits(template, plain, hat) == both | {"accessory": [0], "accessory_and_class": [0]}


def test_what_the_model_does_not_know(tmp_path):
    assert accuracy.read_world(tmp_path) is None
    assert hits("a photo of {concept} on the moon", "a photo of a teapot") == {"class": [1]}
    (tmp_path / "world.json").write_text(json.dumps({"classes": ["teapot"], "phrases": "at night"}))
    with pytest.raises(UserError, match=r"world\.json: .*; expected the classes and places that the model knows"):
        accuracy.read_world(tmp_path)
    world = accuracy.World(("car",), ("at night",))
    found = accuracy.hits(
        world, Captions().text, TEAPOT, "a photo of a blue {class_word}", np.eye(256, dtype=np.float32)[:1]
    )
    assert found.keys() == {"colour"}  # no class, so none to be shown with it
