"""Several concepts in one prompt: whether each is shown, measured where the UNet attends to its class word."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.prompts import fill
from catversion_jax.evaluation import masks, metrics
from catversion_jax.evaluation.image_sets import MaskedImages
from catversion_jax.evaluation.samples import sample, sample_base
from catversion_jax.methods.concept_file import Concept
from catversion_jax.study.scoring import Scorer, heldout
from catversion_jax.utils.types import Float, UInt8


@dataclass(frozen=True)
class Group:
    """The scores of concepts in one prompt."""

    rows: list[dict]  # of each concept: masked CLIP-I in the base model, with it alone and with all; its share shown
    all_shown: float  # share of the images that show every concept
    images: dict[str, list[UInt8[np.ndarray, "h w 3"]]]  # base and together, the first of each prompt


def prompts(folders: Sequence[ConceptFolder], templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates filled with all of the concepts instead of one."""
    first, *others = folders
    *names, last = (first.class_word, *(f"{folder.article} {folder.class_word}" for folder in others))
    return tuple(fill(template, f"{', '.join(names)} and {last}", first.article) for template in templates)


def score_group(scorer: Scorer, folders: Sequence[ConceptFolder], concepts: Sequence[Concept]) -> Group:
    """Scores concepts that are sampled in one prompt.

    An image shows a concept if the region of its class word is nearer to its held-out photos than to those of the
    others, and nearer than the base model's region with the same prompt and seed.
    """
    pipeline, clip, config = scorer.pipeline, scorer.encoders.clip, scorer.config
    asked = prompts(folders, scorer.templates)
    each = [prompt for prompt in asked for _ in config.seeds]
    base = sample_base(pipeline, asked, config)
    together = sample(pipeline, asked, config, config.acting(*concepts), "together")
    references = [clip.image(heldout(folder).masked()) for folder in folders]

    def at_word(images: list[np.ndarray], word: str) -> Float[np.ndarray, "G e"]:
        """Returns the embeddings of the word's region in the images."""
        found = masks.attention_masks(pipeline, np.stack(images), each, word)
        return clip.image(MaskedImages(images, list(found)).masked())

    rows, shown = [], []
    for i, (folder, concept) in enumerate(zip(folders, concepts, strict=True)):
        alone = sample(pipeline, asked, config, config.acting(concept), folder.name)
        variants = {"base": base, "alone": alone, "together": together}
        embeddings = {variant: at_word(images, concept.class_word) for variant, images in variants.items()}
        near = {variant: metrics.clip_i(x, references[i]) for variant, x in embeddings.items()}
        others = [metrics.clip_i(embeddings["together"], x) for j, x in enumerate(references) if j != i]
        shown.append((near["together"] > np.max(others, axis=0)) & (near["together"] > near["base"]))
        means = {variant: float(values.mean()) for variant, values in near.items()}
        rows.append({"concept": folder.name, "shown": float(shown[i].mean())} | means)
    first = {name: images[:: len(config.seeds)] for name, images in (("base", base), ("together", together))}
    return Group(rows, float(np.all(shown, axis=0).mean()), first)
