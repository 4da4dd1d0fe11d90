"""`catversion sweep`: train and score settings on a folder of concepts with held-out photos; a table of what came out.

A concept is a folder with `concept.json` (class_word, article), `train/` and `heldout/`, as in catversion_jax/concepts.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from catversion_jax import concept_folders, encoders, markdown, metrics, sampling
from catversion_jax import config as config_lib
from catversion_jax.claim import claim
from catversion_jax.data.photos import read_photos
from catversion_jax.data.posteriors import posteriors
from catversion_jax.errors import UserError
from catversion_jax.files import json_lines, write_atomically
from catversion_jax.grid import grid
from catversion_jax.heldout_loss import heldout_loss
from catversion_jax.pipeline import Pipeline
from catversion_jax.run_dir import plain
from catversion_jax.source import read_json
from catversion_jax.train import given_config, learn_once, load_model
from catversion_jax.types import Float

PLACE = re.compile(r"a photo of \{concept\} (.+)")


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "The setting that every row starts from.")
    flags.DEFINE_multi_string(
        "try", [], "One row: KEY=VALUE pairs, separated by semicolons; may be given several times."
    )
    flags.DEFINE_string("concepts", str(concept_folders.SHIPPED), "A folder of concepts.")
    flags.DEFINE_string("out", "runs/sweep", "Runs, scores.jsonl, table.md and grids; what is there is not done again.")
    flags.DEFINE_integer("seeds", 2, "Pictures per prompt.", lower_bound=1)
    flags.DEFINE_integer("prompts", 4, "How many of config.sample.prompts.", lower_bound=1)


@dataclass(frozen=True)
class Score:
    """One concept under one setting; base is the untouched model on the same prompts and seeds."""

    setting: str
    concept: str
    clip_i: float
    clip_i_base: float
    place_accuracy: float
    place_accuracy_base: float
    heldout_loss: float
    heldout_loss_base: float
    steps: int  # of the training, fewer where it stopped early


def main(arguments: flags.FlagValues) -> int:
    config = given_config(arguments)
    out = config_lib.expand(arguments.out)
    folders = concept_folders.find(arguments.concepts)
    settings = arguments["try"].value or [""]
    configs = {setting: override(config, setting) for setting in settings}
    claim(out / "sweep.json", {"config": plain(config), "seeds": arguments.seeds, "prompts": arguments.prompts})
    pipeline = load_model(config)
    scores = [Score(**line) for line in json_lines(out / "scores.jsonl")]
    base = cache(partial(draw, pipeline))  # the base model's pictures are the same for every setting
    clip = encoders.of_model(config_lib.model_path(config))
    for setting, config in configs.items():
        for folder in folders:
            if (setting, folder.name) in {(score.setting, score.concept) for score in scores}:
                continue
            score = run(config, setting, folder, out, pipeline, clip, arguments.prompts, arguments.seeds, base)
            scores.append(score)
            with (out / "scores.jsonl").open("a") as file:
                file.write(json.dumps(vars(score)) + "\n")
            print(json.dumps(vars(score)))
    table = to_table([score for score in scores if score.setting in configs])
    write_atomically(out / "table.md", lambda path: path.write_text(table))
    print(table)
    return 0


def override(config: ConfigDict, setting: str) -> ConfigDict:
    """The config with a row's `KEY=VALUE;KEY=VALUE`; values are JSON, or else text."""
    config = config.copy_and_resolve_references()
    for pair in filter(None, setting.split(";")):
        key, _, value = pair.partition("=")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        try:
            config.update_from_flattened_dict({key.strip(): tuple(parsed) if isinstance(parsed, list) else parsed})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--try={setting}: {key} cannot be {value} ({error})") from None
    return config


Draw = Callable[[tuple[str, ...], int, sampling.SamplerConfig], list[np.ndarray]]


def run(
    config: ConfigDict,
    setting: str,
    folder: Path,
    out: Path,
    pipeline: Pipeline,
    clip: encoders.Clip,
    n_prompts: int,
    n_seeds: int,
    base: Draw,
) -> Score:
    """Train on `folder`/train, unless that is done, and score against `folder`/heldout."""
    config.data.dir = str(folder / "train")
    config.concept.update(concept_folders.described(folder))
    config.run_dir = str(out / (re.sub(r"[^\w.=]+", "_", setting) or "config") / folder.name)
    config_lib.check(config)
    concept = learn_once(config, pipeline)
    templates = config.sample.prompts[:n_prompts]
    held_out = np.stack([photo.image for photo in read_photos(folder / "heldout", pipeline.networks.resolution)])
    latents, _ = posteriors(pipeline.networks.vae, pipeline.params["vae"], held_out, flip=False)
    references = clip.image(held_out)
    training_prompt = config_lib.prompts(config.concept.templates, config)[0]
    asked = (tuple(config_lib.prompts(templates, config)), n_seeds, config_lib.sampler_config(config))
    known = read_json(config_lib.model_path(config) / "world.json")["phrases"]
    captions = config_lib.prompts([f"a photo of {{concept}} {place}" for place in known], config)
    places = dict(zip(known, clip.text(captions), strict=True))
    answers = {"_base": (0.0, base(*asked)), "": (1.0, draw(pipeline, *asked, [concept]))}
    values, rows = {}, []
    for name, (strength, pictures) in answers.items():
        embeddings = clip.image(pictures)
        values["clip_i" + name] = float(metrics.clip_i(embeddings, references).mean())
        values["place_accuracy" + name] = place_accuracy(embeddings, templates, n_seeds, places)
        context = sampling.condition(pipeline, [training_prompt], [concept], strength)
        personal = sampling.with_unet(pipeline, [concept], strength)
        values["heldout_loss" + name] = heldout_loss(personal, latents[:, 0], context)
        rows.append(pictures[::n_seeds])
    image = grid([list(held_out[: len(templates)]), *rows], ["held out", "base model", "personalized"], asked[0], 1)
    write_atomically(Path(config.run_dir) / "scored.png", image.save)
    return Score(setting, folder.name, **values, steps=concept.steps)


def draw(pipeline: Pipeline, prompts, n_seeds, sampler, concepts=()) -> list[np.ndarray]:
    """`n_seeds` pictures of each prompt, the same seeds for every setting; without concepts, the base model's."""
    repeated = [prompt for prompt in prompts for _ in range(n_seeds)]
    return list(sampling.paint(pipeline, repeated, list(range(n_seeds)) * len(prompts), sampler, concepts))


def place_accuracy(embeddings, templates, n_seeds: int, places: dict[str, Float[np.ndarray, "e"]]) -> float:
    """Of the pictures whose prompt asks for one of `places` (place -> its caption's embedding), the share whose
    nearest caption is the one asked for; not a number where no prompt does."""
    found = metrics.nearest(embeddings, np.stack(list(places.values())))
    asked = [match and match[1] for match in map(PLACE.fullmatch, templates) for _ in range(n_seeds)]
    hits = [list(places)[i] == place for i, place in zip(found, asked, strict=True) if place in places]
    return float(np.mean(hits)) if hits else float("nan")


COLUMNS = (
    ("CLIP-I", lambda mean: f"{mean['clip_i']:.3f}"),
    ("base", lambda mean: f"{mean['clip_i_base']:.3f}"),
    ("change", lambda mean: f"{mean['clip_i'] - mean['clip_i_base']:+.3f}"),
    ("place accuracy", lambda mean: f"{mean['place_accuracy']:.2f}"),
    ("base", lambda mean: f"{mean['place_accuracy_base']:.2f}"),
    ("held-out loss", lambda mean: f"{mean['heldout_loss']:.4f}"),
    ("base", lambda mean: f"{mean['heldout_loss_base']:.4f}"),
    ("steps", lambda mean: f"{mean['steps']:.0f}"),
)
"""Of the table: header, and what stands there of the means of some scores."""


def to_table(scores: list[Score]) -> str:
    """Markdown: a line for each concept and setting, then a line a setting with the means."""
    rows = []
    for setting in dict.fromkeys(score.setting for score in scores):
        of_setting = [score for score in scores if score.setting == setting]
        rows += [line(setting, score.concept, [score]) for score in of_setting]
        rows.append(line(setting, f"mean of {len(of_setting)}", of_setting))
    return markdown.table(["setting", "concept", *(header for header, _ in COLUMNS)], rows) + "\n"


def line(setting: str, concept: str, scores: list[Score]) -> list[str]:
    mean = {
        name: np.mean([getattr(score, name) for score in scores])
        for name in vars(scores[0])
        if name not in ("setting", "concept")
    }
    return [setting or "the config", concept, *(cell(mean) for _, cell in COLUMNS)]
