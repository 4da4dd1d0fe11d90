"""Several concepts in one prompt: whether each is there, looked for where the UNet attends to its word."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from catversion_jax import answers, config, masks, metrics
from catversion_jax.answers import Drawing
from catversion_jax.artifact import Concept
from catversion_jax.concept_folders import described
from catversion_jax.pipeline import Pipeline
from catversion_jax.scores import Judges, Pictures
from catversion_jax.study.scoring import photos
from catversion_jax.types import Float, UInt8


@dataclass(frozen=True)
class Group:
    """What came of concepts in one prompt."""

    rows: list[dict]  # of each concept: masked CLIP-I in the base model, with it alone and with all; its share shown
    all_shown: float  # share of the pictures that show every concept
    pictures: dict[str, list[UInt8[np.ndarray, "h w 3"]]]  # base and together, the first of each prompt


def prompts(folders: Sequence[Path], templates: Sequence[str]) -> tuple[str, ...]:
    """The templates with all of the concepts in the place of one."""
    first, *others = map(described, folders)
    *names, last = (first["class_word"], *(f"{concept['article']} {concept['class_word']}" for concept in others))
    return tuple(config.fill(template, f"{', '.join(names)} and {last}", first["article"]) for template in templates)


def judge(
    folders: Sequence[Path],
    concepts: Sequence[Concept],
    templates: Sequence[str],
    drawing: Drawing,
    pipeline: Pipeline,
    judges: Judges,
) -> Group:
    """A picture shows a concept where the place of its word is nearer to its held-out photos than to those of the
    others, and nearer than the base model's with the same prompt and seed."""
    asked = prompts(folders, templates)
    each = [prompt for prompt in asked for _ in drawing.seeds]
    base = answers.paint_base(pipeline, asked, drawing)
    together = answers.paint(pipeline, asked, drawing, concepts, "together")
    references = [judges.clip.image(photos(folder, "heldout").masked()) for folder in folders]

    def seen(images: list[np.ndarray], word: str) -> Float[np.ndarray, "G e"]:
        """Embeddings of what is at the word."""
        places = masks.attention_masks(pipeline, np.stack(images), each, word)
        return judges.clip.image(Pictures(images, list(places)).masked())

    rows, shown = [], []
    for i, (folder, concept) in enumerate(zip(folders, concepts, strict=True)):
        drawn = {
            "base": base,
            "alone": answers.paint(pipeline, asked, drawing, [concept], folder.name),
            "together": together,
        }
        at_word = {variant: seen(images, concept.class_word) for variant, images in drawn.items()}
        near = {variant: metrics.clip_i(x, references[i]) for variant, x in at_word.items()}
        others = [metrics.clip_i(at_word["together"], x) for j, x in enumerate(references) if j != i]
        shown.append((near["together"] > np.max(others, axis=0)) & (near["together"] > near["base"]))
        means = {variant: float(values.mean()) for variant, values in near.items()}
        rows.append({"concept": folder.name, "shown": float(shown[i].mean())} | means)
    first = {name: images[:: len(drawing.seeds)] for name, images in (("base", base), ("together", together))}
    return Group(rows, float(np.all(shown, axis=0).mean()), first)
