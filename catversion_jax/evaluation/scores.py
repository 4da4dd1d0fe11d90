"""Rows of scores for each prompt, each concept and all concepts, with intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from catversion_jax.evaluation import metrics
from catversion_jax.evaluation.encoders import Clip, ImageEncoder
from catversion_jax.evaluation.image_sets import ImageSet
from catversion_jax.evaluation.masks import fill_background
from catversion_jax.utils.log import warn
from catversion_jax.utils.padded_batches import groups
from catversion_jax.utils.types import Float, UInt8


@dataclass(frozen=True)
class Encoders:
    clip: Clip
    dino: ImageEncoder | None


Values = dict[str, Float[np.ndarray, "_"]]
"""Score -> its values for the images of one prompt, called a unit: one for each image, or one for all of them; empty
or missing if it is not measured."""

OF_PROMPTS = ("clip_t", "clip_i", "masked_clip_i", "overall", "dino", "diversity")
OF_UNRELATED = ("prior_drift", "prior_drift_text")
SCORES = (*OF_PROMPTS, *OF_UNRELATED)

DEFINITIONS = {
    "clip_t": "cosine of an image and its prompt in CLIP's space",
    "clip_i": "mean cosine over all pairs of images and references in CLIP's space",
    "masked_clip_i": "clip_i with the background of both sides filled before the encoder",
    "overall": "sqrt(clip_t x clip_i), of the means of a row; null where one of them is negative",
    "dino": "mean cosine over all pairs of images and references, of DINO's class token",
    "diversity": "1 - cosine in CLIP's space, mean over all pairs of images of one prompt, mean over prompts",
    "prior_drift": "1 - cosine, in CLIP's space, of the images with and without the concept of a prompt without its "
    "class word, seed by seed",
    "prior_drift_text": "L2 norm of what the concept changes in such a prompt's text states, over that of the base "
    "model's states",
    "attention_mask_iou": "intersection over union of the masks given for the references and those from the UNet's "
    "attention to the class word in them",
    "intervals": "95 % bootstrap percentile intervals (9,999 resamples) of a prompt's images, of a concept's prompts "
    "(its images where it has one prompt), of the concepts (as the concept's where there is one)",
}
"""Score -> its definition, as reports give it. Cosines are raw: neither scaled nor clipped."""


@dataclass(frozen=True)
class Embedded:
    """The embeddings of images, each of unit length."""

    clip: Float[np.ndarray, "N e"]
    masked: Float[np.ndarray, "N e"] | None  # of the images with the background filled, in CLIP's space
    dino: Float[np.ndarray, "N d"] | None


def embed(images: ImageSet, encoders: Encoders) -> Embedded:
    """Embeds images by all encoders. Each is read once and reduced at once, so only one is in memory at its full size.

    Warns of masks that hide nothing.
    """
    clip, dino = encoders.clip.image, encoders.dino
    covering = 0

    def views() -> Iterator[dict[str, np.ndarray]]:
        """Yields the pixels of each image as the encoders take them."""
        nonlocal covering
        for image, mask in images:
            pixels = {"clip": clip.preprocessing(image)}
            if mask is not None:
                pixels["masked"] = clip.preprocessing(fill_background(image, mask))
                covering += int(mask.all())
            if dino:
                pixels["dino"] = dino.preprocessing(image)
            yield pixels

    parts: dict[str, list[np.ndarray]] = {}
    for group in groups(views()):
        for name in group[0]:
            encoder = dino if name == "dino" and dino else clip
            parts.setdefault(name, []).append(encoder.of_pixels([pixels[name] for pixels in group]))
    if covering:
        warn(f"{covering} of {len(images)} masks cover all of their images: masked_clip_i sees their backgrounds too")
    found = {name: np.concatenate(part) for name, part in parts.items()}
    return Embedded(found["clip"], found.get("masked"), found.get("dino"))


def of_prompts(
    prompts: Sequence[str], sampled: ImageSet, references: ImageSet, encoders: Encoders
) -> dict[str, Values]:
    """Returns the values of each prompt; `prompts` has one entry for each sampled image."""
    return of_embedded(prompts, embed(sampled, encoders), embed(references, encoders), encoders)


def of_embedded(prompts: Sequence[str], seen: Embedded, references: Embedded, encoders: Encoders) -> dict[str, Values]:
    """Returns the values of each prompt, as `of_prompts`, of images that are embedded already."""
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    index = np.asarray([numbers[prompt] for prompt in prompts])
    values = {
        "clip_t": metrics.clip_t(seen.clip, encoders.clip.text(list(numbers))[index]),
        "clip_i": metrics.clip_i(seen.clip, references.clip),
    }
    if seen.masked is not None and references.masked is not None:
        values["masked_clip_i"] = metrics.clip_i(seen.masked, references.masked)
    if seen.dino is not None and references.dino is not None:
        values["dino"] = metrics.clip_i(seen.dino, references.dino)
    units = [{name: x[index == i] for name, x in values.items()} for i in numbers.values()]
    for i, unit in enumerate(units):
        spread = metrics.diversity(seen.clip[index == i])
        unit["diversity"] = np.asarray([] if spread is None else [spread])
    return dict(zip(numbers, units, strict=True))


def of_unrelated(
    base: UInt8[np.ndarray, "N h w 3"],
    moved: UInt8[np.ndarray, "N h w 3"],
    states: Sequence[np.ndarray],
    encoders: Encoders,
) -> Values:
    """Returns the values of an unrelated prompt, from its images and text states without and with the concept."""
    seen = encoders.clip.image([*base, *moved])
    return {
        "prior_drift": metrics.drift(*np.split(seen, 2)),
        "prior_drift_text": np.asarray([metrics.relative_change(*states)]),
    }


def single(unit: Values) -> list[Values]:
    """Splits a unit into one for each image; a value for all images goes to the first."""
    return [{name: x[i : i + 1] for name, x in unit.items()} for i in range(max(map(len, unit.values())))]


def sums(units: Sequence[Values], *names: str) -> tuple[Float[np.ndarray, "units"], ...]:
    """Returns, for the units that have these scores, the number of values and the sum of each score's values."""
    having = [unit for unit in units if all(len(unit.get(name, ())) for name in names)]
    counts = np.asarray([len(unit[names[0]]) for unit in having], float)
    return counts, *(np.asarray([unit[name].sum() for unit in having], float) for name in names)


def summarize(units: Sequence[Values], scores: Sequence[str] = SCORES) -> dict:
    """Returns each score's mean over all values, None if there are none, and its interval from resampling the units."""
    # Units are resampled and not values, since the images of one prompt resemble each other, and resampling them singly
    # would make the interval too narrow. A unit enters as a count and a sum: the ratio of the resampled sums and counts
    # is the mean of the values, however many each unit has.
    row, intervals = {}, {}
    for name in scores:
        if name == "overall":
            samples = sums(units, "clip_t", "clip_i")
            statistic = overall_of_sums
        else:
            samples = sums(units, name)
            statistic = np.divide
        mean = statistic(*(sample.mean() for sample in samples[::-1])) if len(samples[0]) else np.nan
        row[name] = None if np.isnan(mean) else float(mean)
        intervals[name] = None if row[name] is None else metrics.interval(statistic, *samples[::-1])
    return row | {"intervals": intervals}


def overall_of_sums(clip_i, clip_t, count):
    return metrics.overall(clip_t / count, clip_i / count)


def concept_row(related: dict[str, Values], unrelated: dict[str, Values]) -> dict:
    """Returns a concept's scores, with those of each prompt and each unrelated prompt."""
    return summarize(concept_units(related, unrelated)) | {
        "prompts": [
            {"prompt": prompt, "pictures": len(unit["clip_t"])} | summarize(single(unit), OF_PROMPTS)
            for prompt, unit in related.items()
        ],
        "unrelated": [{"prompt": p} | summarize(single(unit), OF_UNRELATED) for p, unit in unrelated.items()],
    }


def concept_units(related: dict[str, Values], unrelated: dict[str, Values]) -> list[Values]:
    """Returns what a concept's interval resamples: its prompts or, if it has only one, its images."""
    (first, *more) = related.values()
    return [*([first, *more] if more else single(first)), *unrelated.values()]


def merged(units: Sequence[Values]) -> Values:
    """Merges several units into one."""
    return {
        name: np.concatenate([unit.get(name, np.zeros(0)) for unit in units]) for name in SCORES if name != "overall"
    }
