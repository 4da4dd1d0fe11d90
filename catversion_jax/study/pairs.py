"""Two concepts in one prompt: whether each is there, looked for where the UNet attends to its word."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from catversion_jax import answers, masks, metrics
from catversion_jax.answers import Drawing
from catversion_jax.artifact import Concept
from catversion_jax.pipeline import Pipeline
from catversion_jax.scores import Judges, Pictures
from catversion_jax.study.learning import described
from catversion_jax.study.scoring import photos
from catversion_jax.types import Float, UInt8

VARIANTS = ("base", "alone", "together")
"""The base model, the one concept of the two, and both."""


@dataclass(frozen=True)
class Pair:
    """What came of two concepts in one prompt."""

    rows: list[dict]  # of each concept: its masked CLIP-I in each variant, and the share of pictures that show it
    both: float  # share of pictures that show both
    pictures: dict[str, list[UInt8[np.ndarray, "h w 3"]]]  # of base and together, one of each prompt


def prompts(folders: tuple[Path, Path], templates: tuple[str, ...]) -> tuple[str, ...]:
    """The templates with both in the place of one."""
    first, second = (f"{c['article']} {c['class_word']}" for c in map(described, folders))
    return tuple(template.replace("{concept}", f"{first} and {second}") for template in templates)


def judge(
    folders: tuple[Path, Path],
    concepts: dict[str, Concept],
    templates: tuple[str, ...],
    drawing: Drawing,
    pipeline: Pipeline,
    judges: Judges,
) -> Pair:
    """A picture shows a concept where the place of its word is nearer to its held-out photos than to the other's, and
    nearer than the base model's with the same prompt and seed."""
    asked = prompts(folders, templates)
    each = [prompt for prompt in asked for _ in drawing.seeds]
    own = [concepts[folder.name] for folder in folders]
    drawn = {
        ("base", None): answers.paint_base(pipeline, asked, drawing),
        ("together", None): answers.paint(pipeline, asked, drawing, own, "together"),
        **{("alone", i): answers.paint(pipeline, asked, drawing, [c], "alone") for i, c in enumerate(own)},
    }

    def seen(images: list[np.ndarray], word: str) -> Float[np.ndarray, "G e"]:
        """Embeddings of what is at the word."""
        places = masks.attention_masks(pipeline, np.stack(images), each, word)
        return judges.clip.image(Pictures(images, list(places)).masked())

    references = [judges.clip.image(photos(folder, "heldout").masked()) for folder in folders]
    rows, shown = [], []
    for i, folder in enumerate(folders):
        at_word = {
            variant: seen(drawn.get((variant, None)) or drawn[variant, i], own[i].class_word) for variant in VARIANTS
        }
        near = {variant: metrics.clip_i(x, references[i]) for variant, x in at_word.items()}
        other = metrics.clip_i(at_word["together"], references[1 - i])
        shown.append((near["together"] > other) & (near["together"] > near["base"]))
        rows.append({"concept": folder.name, "shown": float(shown[i].mean())})
        rows[-1] |= {variant: float(values.mean()) for variant, values in near.items()}
    first = {name: images[:: len(drawing.seeds)] for (name, i), images in drawn.items() if i is None}
    return Pair(rows, float((shown[0] & shown[1]).mean()), first)
