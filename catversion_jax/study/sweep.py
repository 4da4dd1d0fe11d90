"""A sweep: a study whose rows are the user's own settings; each concept is scored as soon as it is trained."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catversion_jax.config import OF_A_RUN, Config, from_config_dict, to_config_dict
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.latents import posteriors
from catversion_jax.data.photos import read_photos
from catversion_jax.evaluation import metrics
from catversion_jax.evaluation.heldout_loss import heldout_loss
from catversion_jax.evaluation.samples import sample, sample_base
from catversion_jax.evaluation.scores import Values
from catversion_jax.methods.concept_file import Concept
from catversion_jax.sampling import conditioning
from catversion_jax.study.scoring import Scorer
from catversion_jax.study.training import train_alone
from catversion_jax.utils import markdown
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.image_grid import grid
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.records import Count, decode, read_lines
from catversion_jax.utils.types import Float


@dataclass(frozen=True)
class Score:
    """The scores of one concept under one setting, and those of the base model on the same prompts and seeds."""

    setting: str
    concept: str
    clip_i: float
    clip_i_base: float
    clip_t: float
    clip_t_base: float
    class_accuracy: float | None  # None, as for the next three: the model does not tell, or no prompt asks
    class_accuracy_base: float | None
    place_accuracy: float | None
    place_accuracy_base: float | None
    heldout_loss: float
    heldout_loss_base: float
    steps: Count  # of the training, fewer if it stopped early
    photos: str = ""  # the digest of the concept's folder; "": from before it was recorded


def override(config: Config, setting: str) -> Config:
    """Returns the config with a row's `KEY=VALUE;KEY=VALUE`, whose values are JSON, or else text.

    Raises UserError for an unknown key or an invalid value.
    """
    values = to_config_dict(config)
    for pair in filter(None, setting.split(";")):
        key, _, value = pair.partition("=")
        try:
            parsed = decode(value, object, key, "expected JSON")
        except UserError:
            parsed = value
        try:
            values.update_from_flattened_dict({key.strip(): tuple(parsed) if isinstance(parsed, list) else parsed})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{setting}: {key} cannot be {value} ({error})") from error
    return from_config_dict(values, unset=OF_A_RUN)


def known_scores(path: AnyPath, folders: Sequence[ConceptFolder]) -> list[Score]:
    """Returns the scores in a file. Raises UserError if one is of other photos of a concept than its folder has now."""
    found = list(read_lines(path, Score))
    digests = {folder.name: folder.digest for folder in folders}
    for score in found:
        if score.photos and score.photos != digests.get(score.concept, score.photos):
            raise UserError(f"{path}: scored on other photos of {score.concept}; choose another --out")
    return found


def folder_of(setting: str) -> str:
    """Returns the name of a setting's folder."""
    return re.sub(r"[^\w.=]+", "_", setting) or "config"


def score_setting(config: Config, setting: str, folder: ConceptFolder, out: AnyPath, scorer: Scorer) -> Score:
    """Trains a concept on its photos, unless that is done, and scores it against its held-out photos.

    `scorer` must use the setting's sampler.
    """
    pipeline, clip = scorer.pipeline, scorer.encoders.clip
    run_folder = out / folder_of(setting)
    concept = train_alone(config, folder, run_folder, pipeline)
    photos = read_photos(folder.heldout, pipeline.networks.resolution)
    heldout = [photo.image for photo in photos]
    references = clip.image(heldout)
    latents, _ = posteriors(pipeline.networks.vae, pipeline.params["vae"], np.stack(heldout), flip=False)
    prompts = folder.prompts(scorer.templates)
    (training_prompt, *_) = folder.prompts(config.concept.templates)
    base = sample_base(pipeline, prompts, scorer.config)
    personalized = sample(pipeline, prompts, scorer.config, scorer.config.acting(concept))
    values: dict[str, Any] = {}
    rows = []
    for name, strength, images in (("_base", 0.0, base), ("", None, personalized)):
        embeddings = clip.image(images)
        values["clip_i" + name] = float(metrics.clip_i(embeddings, references).mean())
        captions = np.repeat(clip.text(prompts), len(scorer.config.seeds), axis=0)
        values["clip_t" + name] = float(metrics.clip_t(embeddings, captions).mean())
        hits = scorer.hits(folder, embeddings)
        for kind in ("class", "place"):
            values[f"{kind}_accuracy{name}"] = mean_hits(kind, hits)
        values["heldout_loss" + name] = loss_of(scorer, concept.at(strength), training_prompt, latents[:, 0])
        rows.append(images[:: len(scorer.config.seeds)])
    labels = ["held out", "base model", "personalized"]
    image = grid([heldout[: len(prompts)], *rows], labels, prompts, captions_above=1)
    write_atomically(run_folder / folder.name / "scored.png", image.save)
    return Score(setting, folder.name, **values, steps=concept.steps, photos=folder.digest)


def loss_of(scorer: Scorer, concept: Concept, prompt: str, latents: Float[np.ndarray, "N h w c"]) -> float:
    """Returns the noise-prediction loss on held-out latents, with the concept at its strength."""
    context = conditioning.condition(scorer.pipeline, [prompt], concept)
    return heldout_loss(conditioning.with_unet(scorer.pipeline, concept), latents, context)


def mean_hits(kind: str, hits: Mapping[str, Values]) -> float | None:
    """Returns an accuracy (one of accuracy.NAMES) over the prompts that it applies to; None if there are none."""
    found = [of_prompt[kind] for of_prompt in hits.values() if kind in of_prompt]
    return float(np.concatenate(found).mean()) if found else None


COLUMNS = (
    ("CLIP-I", lambda mean: f"{mean['clip_i']:.3f}"),
    ("base", lambda mean: f"{mean['clip_i_base']:.3f}"),
    ("change", lambda mean: f"{mean['clip_i'] - mean['clip_i_base']:+.3f}"),
    ("CLIP-T", lambda mean: f"{mean['clip_t']:.3f}"),
    ("base", lambda mean: f"{mean['clip_t_base']:.3f}"),
    ("overall", lambda mean: f"{mean['overall']:.3f}"),
    ("base", lambda mean: f"{mean['overall_base']:.3f}"),
    ("class accuracy", lambda mean: f"{mean['class_accuracy']:.2f}"),
    ("base", lambda mean: f"{mean['class_accuracy_base']:.2f}"),
    ("place accuracy", lambda mean: f"{mean['place_accuracy']:.2f}"),
    ("base", lambda mean: f"{mean['place_accuracy_base']:.2f}"),
    ("held-out loss", lambda mean: f"{mean['heldout_loss']:.4f}"),
    ("base", lambda mean: f"{mean['heldout_loss_base']:.4f}"),
    ("steps", lambda mean: f"{mean['steps']:.0f}"),
)
"""Columns of the table: header, and the cell for mean scores."""


def sweep_table(found: list[Score]) -> str:
    """Returns the scores as a Markdown table: for each setting, a line for each concept and one with the means."""
    rows = []
    for setting in dict.fromkeys(score.setting for score in found):
        of_setting = [score for score in found if score.setting == setting]
        rows += [line(setting, score.concept, [score]) for score in of_setting]
        rows.append(line(setting, f"mean of {len(of_setting)}", of_setting))
    return markdown.table(["setting", "concept", *(header for header, _ in COLUMNS)], rows) + "\n"


def line(setting: str, concept: str, found: list[Score]) -> list[str]:
    names = [name for name in vars(found[0]) if name not in ("setting", "concept", "photos")]
    # None becomes NaN, which a mean keeps.
    values = {name: np.asarray([getattr(score, name) for score in found], float) for name in names}
    for name in ("", "_base"):
        values["overall" + name] = np.asarray(metrics.overall(values["clip_t" + name], values["clip_i" + name]))
    mean = {name: value.mean() for name, value in values.items()}
    return [setting or "the config", concept, *(cell(mean) for _, cell in COLUMNS)]
