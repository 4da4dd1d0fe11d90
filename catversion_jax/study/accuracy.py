"""Accuracies by the nearest caption: whether an image shows its class, and the place, colour and accessory asked for.

CLIP's cosines say how near an image is to its prompt, and little about which of its words it shows. Here an image is
compared with captions that differ in one of them, and the nearest one counts, as in CLIP's zero-shot classification
(Radford et al. 2021). The captions are of what the model was trained on, so that the base model is a fair comparison.
"""

import re
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.prompts import article, fill
from catversion_jax.evaluation import metrics
from catversion_jax.evaluation.scores import Values
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.records import read_record
from catversion_jax.utils.types import Bool, Float

PLAIN = "a photo of {concept}"
COLOURED = re.compile(r"a photo of a (\w+) \{class_word\}")
PLACED = re.compile(re.escape(PLAIN) + " (.+)")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white")
ACCESSORIES = ("", "wearing a hat", "wearing sunglasses")
"""What the mini model was trained on besides `World`; "": nothing."""

NAMES = ("class", "place", "colour", "colour_and_class", "accessory", "accessory_and_class")
"""Accuracies: of the images of all prompts, of those with a place, with a colour (and with the class too), and with an
accessory (and with the class too)."""


Embed = Callable[[tuple[str, ...]], Float[np.ndarray, "N e"]]
"""Embeds captions in CLIP's space."""


class World(msgspec.Struct):
    """What the mini model was trained on: its world.json."""

    classes: tuple[str, ...]
    phrases: tuple[str, ...]  # places, as they follow "a photo of a teapot"


def read_world(model: AnyPath) -> World | None:
    """Reads what a model knows; None if its folder does not tell."""
    path = model / "world.json"
    if not path.is_file():
        return None
    return read_record(path, World, "expected the classes and places that the model knows, as in the mini model")


def hits(
    world: World, embed: Embed, folder: ConceptFolder, template: str, embeddings: Float[np.ndarray, "G e"]
) -> Values:
    """Returns, for each accuracy that applies to a prompt, which of its images have it, as 0 and 1.

    `embed` is called with the same captions for many prompts.
    """

    def nearest(captions: Sequence[str], asked: int) -> Bool[np.ndarray, "G"]:
        return metrics.nearest_caption(embeddings, embed(tuple(captions))) == asked

    def nearest_ending(endings: Sequence[str], asked: str) -> Bool[np.ndarray, "G"]:
        return nearest(folder.prompts([f"{PLAIN} {ending}".strip() for ending in endings]), endings.index(asked))

    found: Values = {}
    classes = [fill(PLAIN, word, article(word)) for word in world.classes]
    if folder.class_word in world.classes:
        found["class"] = nearest(classes, world.classes.index(folder.class_word))
    placed, coloured = PLACED.fullmatch(template), COLOURED.fullmatch(template)
    if placed and placed[1] in world.phrases:
        found["place"] = nearest_ending(world.phrases, placed[1])
    if placed and placed[1] in ACCESSORIES:
        found["accessory"] = nearest_ending(ACCESSORIES, placed[1])
    if coloured and coloured[1] in COLOURS:
        captions = folder.prompts([f"a photo of a {colour} {{class_word}}" for colour in COLOURS])
        found["colour"] = nearest(captions, COLOURS.index(coloured[1]))
    for name in ("colour", "accessory"):
        if name in found and "class" in found:
            found[f"{name}_and_class"] = found[name] & found["class"]
    return {name: values.astype(float) for name, values in found.items()}
