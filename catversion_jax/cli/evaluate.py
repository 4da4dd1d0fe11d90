"""`catversion evaluate`: scores images of a concept or of a public benchmark, sampled here or read from disk."""

import json
import math
from collections.abc import Sequence
from typing import Any

from absl import flags

from catversion_jax.base.pipeline import MINI, ModelConfig
from catversion_jax.cli.flags import (
    define_dtype,
    define_embedding,
    define_prompts,
    define_sampling,
    given_embedding,
    given_prompts,
    given_sampler,
    given_seeds,
    given_strength,
    load_concept,
    make_out,
)
from catversion_jax.config import JUDGED
from catversion_jax.data.prompts import article, fill
from catversion_jax.evaluation import benchmarks, encoders, evaluation, grabcut, page, scores
from catversion_jax.evaluation.samples import ConceptTask, EvaluationConfig, ImagesTask
from catversion_jax.evaluation.scores import Encoders
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.model_names import public_name
from catversion_jax.utils.errors import UserError, is_storage_error, short
from catversion_jax.utils.files import check_writable, write_atomically
from catversion_jax.utils.paths import AnyPath, expand


def define_flags() -> None:
    define_embedding()
    flags.DEFINE_string("images", None, "Folder of existing images to score, instead of --embedding.")
    flags.DEFINE_string("references", None, "Folder of photos of the concept, held out from training; required.")
    flags.DEFINE_string(
        "masks", None, "Folder of the references' masks, matched by file stem; if not set, their masks/ if it exists."
    )
    flags.DEFINE_string(
        "image_masks",
        None,
        "Folder of the masks of --images, matched by file stem; if not set, their masks/ if it exists.",
    )
    flags.DEFINE_bool("grabcut", False, "Refine the attention masks along edges, with OpenCV's GrabCut.")
    flags.DEFINE_string("out", None, "JSON file for the scores; a report is written beside it as .html; required.")
    define_prompts(
        "Prompt of the images; may be repeated; if not set, eight prompts of places, a colour and an accessory."
    )
    flags.DEFINE_multi_string(
        "unrelated", list(evaluation.UNRELATED), "Prompt without the class word, for prior_drift; may be repeated."
    )
    flags.DEFINE_enum(
        "protocol", None, list(benchmarks.BENCHMARKS), "Benchmark to evaluate; --references is then its public folder."
    )
    flags.DEFINE_multi_string("subject", [], "Subject of the benchmark; may be repeated; if not set, all.")
    flags.DEFINE_string(
        "manifest",
        None,
        "Manifest file for catversion batch; write the benchmark's subjects to it and evaluate nothing.",
    )
    flags.DEFINE_string(
        "clip", None, "CLIPModel folder or its name on Hugging Face; if not set, the base model's own CLIP."
    )
    flags.DEFINE_string(
        "dino",
        None,
        "ViTModel folder or its name on Hugging Face, such as facebook/dino-vits16; if not set, no DINO score.",
    )
    define_sampling(benchmarks.IMAGES_PER_PROMPT)
    define_dtype(ModelConfig.dtype)


def main(arguments: flags.FlagValues) -> int:
    """Writes the scores to --out and an HTML report beside it."""
    if arguments.manifest:
        return write_manifest(arguments)
    tasks = find_tasks(arguments)
    if not arguments.out:
        raise UserError("--out: missing; expected the JSON file to write")
    out = expand(arguments.out)
    if out.is_dir() or out.suffix == ".html":
        raise UserError(f"--out={out}: expected the name of a JSON file; the report takes the same name with .html")
    make_out(out.parent)
    for path in (out, out.with_suffix(".html")):
        check_writable(path)  # now, and not when hours of scores are to be written
    config = evaluation_config(arguments, tasks)
    shared = load_encoders(arguments, tasks)
    found = evaluation.evaluate(tasks, config, shared)
    given = {name: getattr(arguments, name) for name in ("images", "references", "masks", "image_masks")}
    given["embedding"] = given_embedding(arguments)
    described = {name: value and public_name(value) for name, value in given.items()}
    described |= {"protocol": arguments.protocol} | evaluation.describe(tasks, config, shared, found.rows)
    result = finite(found.result() | {"config": described, "versions": evaluation.versions()})
    for name in scores.SCORES:
        print(f"{name:17}{page.format_score(result[name], result['intervals'][name])}")
    # Before anything is drawn: hours of scores must not be lost to a picture of them.
    document = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(out, lambda path: path.write_text(document))
    write_page(out, result, found.pictures)
    print(f"{sum(row['pictures'] for row in found.rows)} images: {out}, {out.with_suffix('.html')}")
    return 0


def finite(value: Any) -> Any:
    """Returns JSON's types with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_page(out: AnyPath, result: dict, pictures: dict[str, page.Rows]) -> None:
    """Writes the HTML report beside the scores in `out`. Raises UserError if it cannot be drawn."""
    path = out.with_suffix(".html")
    try:
        report = page.render(result, pictures)
    except Exception as error:  # of any type, as fonts, templates and plots are others' code
        if is_storage_error(error):
            raise
        raise UserError(f"{path}: cannot be drawn ({short(error)}); the scores are complete in {out.name}") from error
    write_atomically(path, lambda temporary: temporary.write_text(report, "utf-8", "backslashreplace"))


def write_manifest(arguments: flags.FlagValues) -> int:
    if not arguments.protocol or not arguments.references:
        raise UserError("--manifest: of a benchmark; expected --protocol and, as --references, its public folder")
    subjects = benchmarks.read_subjects(arguments.protocol, expand(arguments.references), arguments.subject)
    path = expand(arguments.manifest)
    write_atomically(path, lambda temporary: temporary.write_text(benchmarks.manifest(subjects)))
    print(f"{len(subjects)} concepts in {path}; learn them with catversion batch --manifest={path}")
    return 0


Task = ConceptTask | ImagesTask


def find_tasks(arguments: flags.FlagValues) -> list[Task]:
    """Returns the concepts to evaluate. Raises UserError for conflicting flags, before a model is loaded."""
    check_flags(arguments)
    source, references = expand(given_embedding(arguments) or arguments.images), expand(arguments.references)
    masks = arguments.masks and expand(arguments.masks)
    image_masks = arguments.image_masks and expand(arguments.image_masks)
    if arguments.protocol:
        return [
            subject_task(arguments, subject, source, masks, image_masks)
            for subject in benchmarks.read_subjects(arguments.protocol, references, arguments.subject)
        ]
    name = source.resolve().name
    if arguments.images:
        return [ImagesTask(name, prompts_for(arguments, None), references, masks, source, image_masks)]
    concept = load_concept(str(source))
    return [ConceptTask(name, prompts_for(arguments, concept), references, masks, source, concept)]


def subject_task(
    arguments: flags.FlagValues,
    subject: benchmarks.Subject,
    source: AnyPath,
    masks: AnyPath | None,
    image_masks: AnyPath | None,
) -> Task:
    """Returns the task of a benchmark's subject, whose files are in folders of its name."""
    shared = (subject.name, subject.prompts, subject.photos, masks and masks / subject.name, source / subject.name)
    if arguments.images:
        return ImagesTask(*shared, image_masks and image_masks / subject.name)
    return ConceptTask(*shared, concept_file.load(source / subject.name))


def task_concepts(tasks: Sequence[Task]) -> dict[str, Concept]:
    """Returns the tasks' concepts, by their sources."""
    return {str(task.source): task.concept for task in tasks if isinstance(task, ConceptTask)}


def check_flags(arguments: flags.FlagValues) -> None:
    """Raises UserError for missing or conflicting flags."""
    if bool(arguments.embedding) == bool(arguments.images):
        raise UserError("--embedding, --images: expected one of them: a learned concept, or images that exist already")
    if not arguments.references:
        raise UserError("--references: missing; expected a folder of photos of the concept, held out from training")
    if arguments.image_masks and not arguments.images:
        raise UserError("--image_masks: of --images; without them, masks come from the UNet's attention")
    if arguments.grabcut:
        grabcut.check_installed()
        if arguments.images:
            raise UserError("--grabcut: of the masks from attention, with --embedding; give --images their own masks")
    if arguments.protocol and (arguments.prompt or arguments.prompts_file):
        raise UserError(f"--prompt: {arguments.protocol} has its own prompts; leave it out, or leave out --protocol")


def prompts_for(arguments: flags.FlagValues, concept: Concept | None) -> tuple[str, ...]:
    """Returns the prompts of --prompt and --prompts_file or, without any, JUDGED for the concept's class word."""
    if concept and concept.class_word and not (arguments.prompt or arguments.prompts_file):
        word = concept.class_word
        return tuple(fill(template, word, article(word)) for template in JUDGED)
    return tuple(given_prompts(arguments))


def load_encoders(arguments: flags.FlagValues, tasks: Sequence[Task]) -> Encoders:
    model = arguments.model or next((concept.model_path for concept in task_concepts(tasks).values()), "")
    clip = encoders.load_clip(arguments.clip) if arguments.clip else encoders.of_model(model or MINI)
    return Encoders(clip, encoders.load_dino(arguments.dino) if arguments.dino else None)


def evaluation_config(arguments: flags.FlagValues, tasks: Sequence[Task]) -> EvaluationConfig:
    return EvaluationConfig(
        sampler=given_sampler(arguments, task_concepts(tasks)),
        seeds=given_seeds(arguments),
        strength=given_strength(arguments),
        unrelated=tuple(dict.fromkeys(arguments.unrelated)),
        model=arguments.model or "",
        dtype=arguments.dtype,
        grabcut=arguments.grabcut,
    )
