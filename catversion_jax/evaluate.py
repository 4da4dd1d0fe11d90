"""`catversion evaluate`: score a concept's pictures, drawn here or before, of one concept or of a public benchmark."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from catversion_jax import (
    __version__,
    answers,
    artifact,
    config,
    drawing_flags,
    encoders,
    grabcut,
    masks,
    page,
    protocols,
    scores,
)
from catversion_jax.answers import Drawing, Job
from catversion_jax.config import expand
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.generate import make_folder, read_prompts
from catversion_jax.pipeline import MINI
from catversion_jax.scores import Judges

UNRELATED = (
    "a photo of a car",
    "a photo of a cat",
    "a photo of a chair",
    "a photo of a bicycle",
    "a photo of a guitar",
    "a photo of a house",
)
"""Of these, the prompts that hold the class word are left out."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "transformers")


def define_flags() -> None:
    flags.DEFINE_string("embedding", None, "A run directory of catversion train, or its concept.safetensors.")
    flags.DEFINE_string("images", None, "A folder of pictures that exist already, instead of --embedding.")
    flags.DEFINE_string("references", None, "A folder of photos of the concept, held out from training.")
    flags.DEFINE_string(
        "masks", None, "A folder with a mask for each reference, of its file stem. Default: its masks/."
    )
    flags.DEFINE_string("image_masks", None, "A folder with a mask for each of --images.")
    flags.DEFINE_bool("grabcut", False, "Draw the masks from attention again along edges, with OpenCV.")
    flags.DEFINE_string("out", None, "The JSON file to write; the report is written beside it, as .html.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times. Default: of config.JUDGED.")
    flags.DEFINE_string("prompts_file", None, "A text file with one prompt a line.")
    flags.DEFINE_multi_string("unrelated", list(UNRELATED), "A prompt without the class word, for prior_drift.")
    flags.DEFINE_enum("protocol", None, list(protocols.PROTOCOLS), "A benchmark: --references is its public folder.")
    flags.DEFINE_multi_string("subject", [], "Of the benchmark; may be given several times. Default: all.")
    flags.DEFINE_string("manifest", None, "Write the benchmark's subjects for catversion batch; evaluate nothing.")
    flags.DEFINE_string("clip", None, "A CLIPModel folder, or its name on Hugging Face. Default: the base model's own.")
    flags.DEFINE_string("dino", None, "A ViTModel folder, or its name on Hugging Face, such as facebook/dino-vits16.")
    drawing_flags.define(protocols.PICTURES_PER_PROMPT)
    flags.adopt_module_key_flags(drawing_flags)


def main(arguments: flags.FlagValues) -> int:
    """Write FILE.json and FILE.html."""
    if arguments.manifest:
        return write_manifest(arguments)
    jobs = find_jobs(arguments)
    if not arguments.out:
        raise UserError("--out: missing; expected the JSON file to write")
    out = expand(arguments.out)
    if out.is_dir() or out.suffix == ".html":
        raise UserError(f"--out={out}: expected the name of a JSON file; the report takes the same name with .html")
    make_folder(out.parent)
    judges = load_judges(arguments, jobs)
    drawing = drawing_of(arguments)
    rows, units, grids = [], [], {}
    for job in tqdm(jobs, unit=" concepts", disable=len(jobs) == 1):
        references = answers.pictures_of(answers.read_references(job))
        answer = answers.draw(job, drawing, judges) if job.concept else answers.read(job)
        related = scores.of_prompts(answer.prompts, answer.pictures, references, judges)
        counts = {"concept": job.name, "references": len(references.images), "pictures": len(answer.prompts)}
        rows.append(counts | {"attention_mask_iou": answer.attention_mask_iou})
        rows[-1] |= scores.concept_row(related, answer.unrelated)
        units.append(scores.concept_units(related, answer.unrelated))
        grids[job.name] = page.picture_grid(references, answer.prompts, answer.pictures)
    overlaps = [row["attention_mask_iou"] for row in rows if row["attention_mask_iou"] is not None]
    result = scores.summarize([scores.merged(unit) for unit in units] if len(units) > 1 else units[0]) | {
        "attention_mask_iou": float(np.mean(overlaps)) if overlaps else None,
        "concepts": rows,
        "definitions": scores.DEFINITIONS,
        "config": describe(arguments, jobs, drawing, judges, rows),
        "versions": versions(),
    }
    document = json.dumps(result, indent=1, allow_nan=False) + "\n"
    report = page.render(result, grids)
    write_atomically(out, lambda path: path.write_text(document))
    write_atomically(out.with_suffix(".html"), lambda path: path.write_text(report, "utf-8"))
    for name in scores.SCORES:
        print(f"{name:17}{page.number(result[name], result['intervals'][name])}")
    print(f"{sum(row['pictures'] for row in rows)} pictures: {out}, {out.with_suffix('.html')}")
    return 0


def write_manifest(arguments: flags.FlagValues) -> int:
    if not arguments.protocol or not arguments.references:
        raise UserError("--manifest: of a benchmark; expected --protocol and, as --references, its public folder")
    subjects = protocols.read(arguments.protocol, expand(arguments.references), arguments.subject)
    path = expand(arguments.manifest)
    write_atomically(path, lambda temporary: temporary.write_text(protocols.manifest(subjects)))
    print(f"{len(subjects)} concepts in {path}; learn them with catversion batch --manifest={path}")
    return 0


def find_jobs(arguments: flags.FlagValues) -> list[Job]:
    """What the flags ask for. Raises UserError where they do not fit each other, before anything is loaded."""
    if bool(arguments.embedding) == bool(arguments.images):
        raise UserError(
            "--embedding, --images: expected one of them: a learned concept, or pictures that exist already"
        )
    if not arguments.references:
        raise UserError("--references: missing; expected a folder of photos of the concept, held out from training")
    if arguments.image_masks and not arguments.images:
        raise UserError("--image_masks: of --images; without them, masks come from the UNet's attention")
    if arguments.grabcut:
        grabcut.check()
        if arguments.images:
            raise UserError(
                "--grabcut: of the masks from attention, with --embedding; give --images masks of their own"
            )
    source, references = expand(arguments.embedding or arguments.images), expand(arguments.references)
    masks_dir, image_masks = (path and expand(path) for path in (arguments.masks, arguments.image_masks))
    if not arguments.protocol:
        concept = artifact.load(source) if arguments.embedding else None
        prompts = asked_prompts(arguments, concept)
        return [Job(source.resolve().name, prompts, references, masks_dir, concept, source, image_masks)]
    if arguments.prompt or arguments.prompts_file:
        raise UserError(f"--prompt: {arguments.protocol} has its own prompts; leave it out, or leave out --protocol")
    return [
        Job(
            subject.name,
            subject.prompts,
            subject.photos,
            masks_dir and masks_dir / subject.name,
            artifact.load(source / subject.name) if arguments.embedding else None,
            source / subject.name,
            image_masks and image_masks / subject.name,
        )
        for subject in protocols.read(arguments.protocol, references, arguments.subject)
    ]


def asked_prompts(arguments: flags.FlagValues, concept: artifact.Concept | None) -> tuple[str, ...]:
    """Those of --prompt and --prompts_file or, for a concept, config.JUDGED."""
    if concept and concept.class_word and not (arguments.prompt or arguments.prompts_file):
        word = concept.class_word
        return tuple(config.fill(template, word, config.article(word)) for template in config.JUDGED)
    return tuple(read_prompts(arguments))


def load_judges(arguments: flags.FlagValues, jobs: Sequence[Job]) -> Judges:
    model = arguments.model or next((job.concept.model_path for job in jobs if job.concept), "")
    clip = encoders.load_clip(arguments.clip) if arguments.clip else encoders.of_model(model or MINI)
    return Judges(clip, encoders.load_dino(arguments.dino) if arguments.dino else None)


def drawing_of(arguments: flags.FlagValues) -> Drawing:
    return Drawing(
        drawing_flags.sampler(arguments),
        drawing_flags.seeds(arguments),
        arguments.strength,
        tuple(dict.fromkeys(arguments.unrelated)),
        arguments.model or "",
        arguments.dtype,
        arguments.grabcut,
    )


def describe(
    arguments: flags.FlagValues, jobs: Sequence[Job], drawing: Drawing, judges: Judges, rows: Sequence[dict]
) -> dict:
    """What has to be said with the numbers: who judged, how it was drawn and masked."""
    given = ("embedding", "images", "references", "masks", "image_masks", "protocol")
    concepts = {job.name: job.concept.metadata() for job in jobs if job.concept}
    measured = any(row["masked_clip_i"] is not None for row in rows)
    by_attention = "attention, GrabCut" if drawing.grabcut else "attention"
    return {name: getattr(arguments, name) for name in given} | {
        "clip": judges.clip.image.described(),
        "dino": judges.dino and judges.dino.described(),
        "background": {
            "fill_rgb": masks.FILL,
            "masks_of_references": "files" if measured else None,
            "masks_of_pictures": (by_attention if concepts else "files") if measured else None,
            "attention": {"timesteps": masks.TIMESTEPS, "threshold": "Otsu"} if measured and concepts else None,
        },
        "drawing": asdict(drawing) if concepts else None,
        "concepts": concepts,
    }


def versions() -> dict[str, str]:
    ours = {"catversion-jax": __version__, "python": platform.python_version(), "backend": jax.default_backend()}
    return ours | {package: importlib.metadata.version(package) for package in PACKAGES}
