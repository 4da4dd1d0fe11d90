"""`catversion evaluate`: score a concept's images, sampled here or before, of one concept or of a public benchmark."""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from catversion_jax.base.pipeline import MINI
from catversion_jax.cli.flags import (
    define_embedding,
    define_prompts,
    define_sampling,
    given_prompts,
    given_sampler,
    given_seeds,
    make_folder,
)
from catversion_jax.config import JUDGED
from catversion_jax.data.prompts import article, fill
from catversion_jax.evaluation import benchmarks, encoders, evaluation, grabcut, page, scores
from catversion_jax.evaluation.samples import EvaluationConfig, EvaluationTask
from catversion_jax.evaluation.scores import Encoders
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import expand, write_atomically


def define_flags() -> None:
    define_embedding()
    flags.DEFINE_string("images", None, "A folder of images that exist already, instead of --embedding.")
    flags.DEFINE_string("references", None, "A folder of photos of the concept, held out from training.")
    flags.DEFINE_string(
        "masks", None, "A folder with a mask for each reference, of its file stem. Default: its masks/."
    )
    flags.DEFINE_string("image_masks", None, "A folder with a mask for each of --images.")
    flags.DEFINE_bool("grabcut", False, "Redraw the masks from attention along edges, with OpenCV.")
    flags.DEFINE_string("out", None, "The JSON file to write; the report is written beside it, as .html.")
    define_prompts("A prompt; may be given several times. Default: eight places, colours and accessories.")
    flags.DEFINE_multi_string(
        "unrelated", list(evaluation.UNRELATED), "A prompt without the class word, for prior_drift."
    )
    flags.DEFINE_enum("protocol", None, list(benchmarks.BENCHMARKS), "A benchmark: --references is its public folder.")
    flags.DEFINE_multi_string("subject", [], "Of the benchmark; may be given several times. Default: all.")
    flags.DEFINE_string("manifest", None, "Write the benchmark's subjects for catversion batch; evaluate nothing.")
    flags.DEFINE_string("clip", None, "A CLIPModel folder, or its name on Hugging Face. Default: the base model's own.")
    flags.DEFINE_string("dino", None, "A ViTModel folder, or its name on Hugging Face, such as facebook/dino-vits16.")
    define_sampling(benchmarks.IMAGES_PER_PROMPT)


def main(arguments: flags.FlagValues) -> int:
    """Writes FILE.json and FILE.html."""
    if arguments.manifest:
        return write_manifest(arguments)
    tasks = find_tasks(arguments)
    if not arguments.out:
        raise UserError("--out: missing; expected the JSON file to write")
    out = expand(arguments.out)
    if out.is_dir() or out.suffix == ".html":
        raise UserError(f"--out={out}: expected the name of a JSON file; the report takes the same name with .html")
    make_folder(out.parent)
    config = evaluation_config(arguments, tasks)
    shared = load_encoders(arguments, tasks)
    found = evaluation.evaluate(tasks, config, shared)
    given = ("embedding", "images", "references", "masks", "image_masks", "protocol")
    described = {name: getattr(arguments, name) for name in given}
    described |= evaluation.describe(tasks, config, shared, found.rows)
    result = found.result() | {"config": described, "versions": evaluation.versions()}
    write_report(out, result, page.render(result, found.grids))
    for name in scores.SCORES:
        print(f"{name:17}{page.number(result[name], result['intervals'][name])}")
    print(f"{sum(row['pictures'] for row in found.rows)} images: {out}, {out.with_suffix('.html')}")
    return 0


def write_report(out: Path, result: dict, report: str) -> None:
    document = json.dumps(result, indent=1, allow_nan=False) + "\n"
    write_atomically(out, lambda path: path.write_text(document))
    write_atomically(out.with_suffix(".html"), lambda path: path.write_text(report, "utf-8"))


def write_manifest(arguments: flags.FlagValues) -> int:
    if not arguments.protocol or not arguments.references:
        raise UserError("--manifest: of a benchmark; expected --protocol and, as --references, its public folder")
    subjects = benchmarks.read(arguments.protocol, expand(arguments.references), arguments.subject)
    path = expand(arguments.manifest)
    write_atomically(path, lambda temporary: temporary.write_text(benchmarks.manifest(subjects)))
    print(f"{len(subjects)} concepts in {path}; learn them with catversion batch --manifest={path}")
    return 0


def find_tasks(arguments: flags.FlagValues) -> list[EvaluationTask]:
    """What the flags ask for. Raises UserError if they do not fit each other, before anything is loaded."""
    check_flags(arguments)
    source, references = expand(arguments.embedding or arguments.images), expand(arguments.references)
    masks_dir, image_masks = (path and expand(path) for path in (arguments.masks, arguments.image_masks))
    if not arguments.protocol:
        concept = concept_file.load(source) if arguments.embedding else None
        prompts, name = prompts_for(arguments, concept), source.resolve().name
        return [EvaluationTask(name, prompts, references, masks_dir, concept, source, image_masks)]
    return [
        EvaluationTask(
            subject.name,
            subject.prompts,
            subject.photos,
            masks_dir and masks_dir / subject.name,
            concept_file.load(source / subject.name) if arguments.embedding else None,
            source / subject.name,
            image_masks and image_masks / subject.name,
        )
        for subject in benchmarks.read(arguments.protocol, references, arguments.subject)
    ]


def check_flags(arguments: flags.FlagValues) -> None:
    """Raises UserError for flags that do not fit each other."""
    if bool(arguments.embedding) == bool(arguments.images):
        raise UserError("--embedding, --images: expected one of them: a learned concept, or images that exist already")
    if not arguments.references:
        raise UserError("--references: missing; expected a folder of photos of the concept, held out from training")
    if arguments.image_masks and not arguments.images:
        raise UserError("--image_masks: of --images; without them, masks come from the UNet's attention")
    if arguments.grabcut:
        grabcut.check()
        if arguments.images:
            raise UserError("--grabcut: of the masks from attention, with --embedding; give --images their own masks")
    if arguments.protocol and (arguments.prompt or arguments.prompts_file):
        raise UserError(f"--prompt: {arguments.protocol} has its own prompts; leave it out, or leave out --protocol")


def prompts_for(arguments: flags.FlagValues, concept: Concept | None) -> tuple[str, ...]:
    """Those of --prompt and --prompts_file or, for a concept, JUDGED."""
    if concept and concept.class_word and not (arguments.prompt or arguments.prompts_file):
        word = concept.class_word
        return tuple(fill(template, word, article(word)) for template in JUDGED)
    return tuple(given_prompts(arguments))


def load_encoders(arguments: flags.FlagValues, tasks: Sequence[EvaluationTask]) -> Encoders:
    model = arguments.model or next((task.concept.model_path for task in tasks if task.concept), "")
    clip = encoders.load_clip(arguments.clip) if arguments.clip else encoders.of_model(model or MINI)
    return Encoders(clip, encoders.load_dino(arguments.dino) if arguments.dino else None)


def evaluation_config(arguments: flags.FlagValues, tasks: Sequence[EvaluationTask]) -> EvaluationConfig:
    return EvaluationConfig(
        sampler=given_sampler(arguments, {str(task.source): task.concept for task in tasks if task.concept}),
        seeds=given_seeds(arguments),
        strength=arguments.strength,
        unrelated=tuple(dict.fromkeys(arguments.unrelated)),
        model=arguments.model or "",
        dtype=arguments.dtype,
        grabcut=arguments.grabcut,
    )
