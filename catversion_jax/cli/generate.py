"""`catversion generate`: samples images with a learned concept."""

from collections.abc import Iterable, Sequence

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from catversion_jax.api.pipeline import Pipeline
from catversion_jax.base.pipeline import drawing_dtype
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.cli import generate_jobs
from catversion_jax.cli.flags import (
    define_dtype,
    define_embedding,
    define_lora,
    define_prompts,
    define_sampling,
    given_concepts,
    given_prompts,
    given_sampler,
    given_seeds,
    given_strength,
    load_concept,
    make_out,
)
from catversion_jax.cli.pictures import lora_sources, save_picture, with_loras
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.concept_model import model_of, warnings
from catversion_jax.methods.model_names import is_on_hub, public_name
from catversion_jax.sampling.conditioning import acts, movement
from catversion_jax.sampling.image_names import free_grid_name, unique_slugs
from catversion_jax.sampling.picture_input import DENOISE, MAX_SIDE, PictureInput, read_input
from catversion_jax.sampling.picture_record import (
    PictureRecord,
    UsedConcept,
    UsedLora,
    as_text,
    read_picture,
    reading_of,
)
from catversion_jax.sampling.picture_sources import Sources, add_sources, read_sources
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.image_grid import grid, reduced
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, expand
from catversion_jax.weights import hub

GRID_COLUMNS = 8
OF_A_PICTURE = (
    "prompt",
    "negative_prompt",
    "seed",
    "scheduler",
    "steps",
    "guidance",
    "batch_size",
    "dtype",
    "width",
    "height",
)
"""Flags that are named as the record of a picture has them."""
SIDES = ("width", "height")
GRID_IMAGES, GRID_PIXELS = 256, 256
"""Images in the grid, and the side of each, at most: the grid of thousands of large ones would take gigabytes."""


def define_flags() -> None:
    define_embedding(several=True)
    define_prompts("Prompt with the class word; may be repeated.")
    flags.DEFINE_string(
        "out", "pictures", f"Folder for the images and a grid of the first {GRID_IMAGES}; a second call adds to it."
    )
    flags.DEFINE_string("negative_prompt", "", "Prompt to steer away from; never sees the concept.")
    for side in SIDES:
        flags.DEFINE_integer(
            side, None, f"Pixels, a multiple of 8 (the mini model: 4), at most {MAX_SIDE}; if not set, the model's own."
        )
    flags.DEFINE_string("image", None, "Picture to draw anew: as a whole, or where --image_mask is bright or opaque.")
    flags.DEFINE_string("image_mask", None, "Mask of --image, of its size; outside of it the picture stays as it is.")
    flags.DEFINE_float(
        "denoise", None, f"Share of the steps for --image: more change more; if not set, {DENOISE}.", 0, 1
    )
    flags.DEFINE_string(
        "like", None, "PNG file of catversion generate to make again; other flags change what it says, such as --seed."
    )
    flags.DEFINE_string(
        "jobs",
        None,
        "File of pictures to sample, each with concepts of its own: a JSON object a line (docs/pictures.md).",
    )
    flags.DEFINE_bool("check", False, "Sample nothing; print how far the concept moves each prompt's text states.")
    define_lora()
    define_sampling()
    define_dtype(None, "; if not set, float32 on a CPU, bfloat16 elsewhere")


def main(arguments: flags.FlagValues) -> int:
    """Writes `<prompt-slug>_<key>_<seed>.png` for every prompt and seed, and a grid of them."""
    if not arguments.out:  # a shell variable that is not set
        raise UserError("--out: empty; expected a folder; . is this one")
    out = expand(arguments.out)
    if arguments.jobs is not None:
        if not arguments.jobs:
            raise UserError("--jobs: empty; expected a file with a JSON object a line")
        return generate_jobs.main(arguments, make_out(out))
    record = follow(arguments) if arguments.like else None
    loaded, strength = given_concepts(arguments), given_strength(arguments)
    concepts = {source: concept.at(strength) for source, concept in loaded.items()}
    if record and strength is None:
        used = {used.digest: used.strength for used in record.concepts}
        concepts = {source: concept.at(used.get(concept.digest)) for source, concept in loaded.items()}
    check_composition(list(concepts.values()))
    sampler = SamplerConfig() if arguments.check else given_sampler(arguments, concepts)
    prompts = given_prompts(arguments)
    if not arguments.check:
        make_out(out)
    pipe = Pipeline.for_concepts(
        concepts, model_of(concepts, arguments.model or "", arguments.dtype or drawing_dtype())
    )
    pipe = with_loras(pipe, arguments)
    if record:
        check_same(record, arguments, pipe)
    if arguments.check:
        print_movement(pipe, prompts, list(concepts.values()))
        return 0
    start = given_start(arguments, pipe)
    if record:
        check_start(record, arguments, start)
    size = (arguments.width or 0, arguments.height or 0)
    request = SampleRequest.every(prompts, given_seeds(arguments), sampler, arguments.negative_prompt, *size, start)
    files = [arguments.image, arguments.image_mask] if arguments.image_mask else [arguments.image]
    add_sources(out, concepts, pipe.model.path, {start.digest: files} if start else {}, lora_sources(pipe, arguments))
    given = list(concepts.values())
    pictures = pipe.records(request, [given] * len(request.prompts))
    rows = write_images(out, pictures, pipe.sample(request, given))
    path = free_grid_name(out)
    write_atomically(path, wrapped_grid(rows).save)
    count, shown = len(request.prompts), sum(map(len, rows.values()))
    print(f"{count} images in {out}, {'together' if shown == count else f'the first {shown} together'} in {path}")
    return 0


def print_movement(pipe: Pipeline, prompts: Sequence[str], concepts: Sequence[Concept]) -> None:
    """Prints how far each concept moves each prompt's text states."""
    for warning in warnings(pipe.base, prompts, concepts):
        warn(warning)
    acting = [concept for concept in concepts if acts(concept)]
    for concept in concepts:
        others = [other for other in acting if other is not concept]
        lines = movement(pipe.base, prompts, concept, others)
        print(*(f"{concept.class_word}: {line}" if others else line for line in lines), sep="\n")


def follow(arguments: flags.FlagValues) -> PictureRecord:
    """Sets the flags that are not given to what the picture of --like says; returns its record.

    Raises UserError if the picture does not say it, or if its concepts or its model are not found by its folder.
    """
    path = expand(arguments.like)
    record, sources = read_picture(path), read_sources(path.parent)
    values: dict[str, object] = {name: getattr(record, name) for name in OF_A_PICTURE}
    if not arguments.prompts_file:
        values["prompt"] = [record.prompt]
    values["num"] = 1
    if not arguments["embedding"].present:
        if not record.concepts:
            raise UserError(f"{path}: made without a concept; give --embedding")
        arguments["embedding"].value = [concept_source(path, used, sources) for used in record.concepts]
    if record.loras and not arguments["lora"].present:
        values["lora"] = [f"{lora_source(path, used, sources)}:{used.scale!r}" for used in record.loras]
    if record.start:
        values["denoise"] = record.denoise
        if not arguments["image"].present:
            values |= start_of(path, record, sources)
    if record.model_id in sources.models:
        values["model"] = sources.models[record.model_id]
    elif is_on_hub(record.model) and record.model not in {load_concept(s).model_path for s in arguments.embedding}:
        # A picture may come from a stranger, and what it names is not downloaded.
        if not arguments["model"].present and not hub.is_cached(record.model, ""):
            raise UserError(
                f"{path}: made with {record.model} of {hub.endpoint()}, which is not in the cache; to download it, say "
                f"--model={record.model}"
            )
        values["model"] = record.model
    for name, value in values.items():
        if not arguments[name].present:
            arguments[name].value = value
    return record


def check_same(record: PictureRecord, arguments: flags.FlagValues, pipe: Pipeline) -> None:
    """Raises UserError if the base model is not that of the picture to make again, and none was asked for."""
    prompts = (record.prompt, record.negative_prompt)
    if not arguments["prompt"].present and max(reading_of(pipe.base, prompt) for prompt in prompts) != record.reading:
        raise UserError(
            f"{arguments.like}: made when prompts had no weights and were cut; give --prompt, with \\( for ("
        )
    if not arguments["lora"].present and [x.digest for x in pipe.loras] != [x.digest for x in record.loras]:
        raise UserError(f"{arguments.like}: its LoRAs are others by now; give them as --lora")
    if arguments["model"].present or arguments["embedding"].present:
        return
    model = pipe.model
    if (as_text(public_name(model.path)), pipe.base.fingerprint) != (record.model, record.fingerprint):
        raise UserError(f"{arguments.like}: made with the model {record.model or 'mini'!r}; give its path as --model")


def check_start(record: PictureRecord, arguments: flags.FlagValues, start: PictureInput | None) -> None:
    """Raises UserError if the picture that another one began as is not what it was, and no other was asked for."""
    if any(arguments[name].present for name in ("image", "image_mask", *SIDES)):
        return
    if record.start and (start is None or start.digest != record.start):
        raise UserError(f"{arguments.image}: another picture by now than the one that was drawn anew; give --image")


def start_of(picture: AnyPath, record: PictureRecord, sources: Sources) -> dict[str, object]:
    """Returns the flags of the picture that another one began as. Raises UserError if its folder does not name it."""
    files = sources.starts.get(record.start, ())
    if not files:
        raise UserError(f"{picture}: began as a picture of which its folder does not say where it is; give --image")
    return dict(zip(("image", "image_mask"), files, strict=False))


def given_start(arguments: flags.FlagValues, pipe: Pipeline) -> PictureInput | None:
    """Returns the picture of --image; None without one. Raises UserError for flags that need it."""
    if not arguments.image:
        for name in ("image_mask", "denoise"):
            if arguments[name].value is not None:
                raise UserError(f"--{name}: of --image, which is missing; give the picture to draw anew")
        return None
    mask = expand(arguments.image_mask) if arguments.image_mask else None
    denoise = DENOISE if arguments.denoise is None else arguments.denoise
    size = (arguments.width or 0, arguments.height or 0)
    return read_input(expand(arguments.image), mask, denoise, pipe.base.networks, size)


def lora_source(picture: AnyPath, used: UsedLora, sources: Sources) -> str:
    """Returns where a picture's LoRA is. Raises UserError if it is not known."""
    if used.digest not in sources.loras:
        raise UserError(
            f"{picture}: made with the LoRA {used.name}, of which its folder does not say where; give --lora"
        )
    return sources.loras[used.digest]


def concept_source(picture: AnyPath, used: UsedConcept, sources: Sources) -> str:
    """Returns where a picture's concept is. Raises UserError if it is not known, or another one by now."""
    source = sources.concepts.get(used.digest)
    if source is None:
        raise UserError(
            f"{picture}: made with a concept of {used.class_word!r} ({used.digest}), of which its folder does not say "
            "where it is; give --embedding"
        )
    if load_concept(source).digest != used.digest:
        raise UserError(f"{source}: another concept by now than the one of {picture} ({used.digest}); give --embedding")
    return source


def write_images(out: AnyPath, pictures: Iterable[PictureRecord], images) -> dict[str, list[np.ndarray]]:
    """Writes each image as soon as it is sampled; returns the first GRID_IMAGES by prompt, reduced for the grid."""
    pictures = list(pictures)
    prompts = list(dict.fromkeys(picture.prompt for picture in pictures))
    slugs = dict(zip(prompts, unique_slugs(prompts), strict=True))
    rows: dict[str, list[np.ndarray]] = {}
    left = GRID_IMAGES
    for picture, image in tqdm(zip(pictures, images, strict=True), total=len(pictures), unit=" images"):
        path = out / f"{slugs[picture.prompt]}_{picture.key}_{picture.seed}.png"
        save_picture(path, image, picture)
        if left:
            rows.setdefault(picture.prompt, []).append(reduced(image, GRID_PIXELS))
            left -= 1
    return rows


def wrapped_grid(rows: dict[str, list[np.ndarray]]) -> Image.Image:
    """Returns a grid with a row for each prompt, wrapped at GRID_COLUMNS images."""
    labelled = [
        (prompt if i == 0 else "", images[i : i + GRID_COLUMNS])
        for prompt, images in rows.items()
        for i in range(0, len(images), GRID_COLUMNS)
    ]
    return grid([images for _, images in labelled], [label for label, _ in labelled])
