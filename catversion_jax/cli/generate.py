"""`catversion generate`: samples images with a learned concept."""

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from catversion_jax.api.pipeline import Pipeline
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.cli.flags import (
    define_embedding,
    define_prompts,
    define_sampling,
    given_concepts,
    given_prompts,
    given_sampler,
    given_seeds,
    given_strength,
    make_out,
)
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_model import model_of, warnings
from catversion_jax.sampling.conditioning import acts, movement
from catversion_jax.sampling.image_names import free_grid_name, unique_slugs
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.image_grid import grid, reduced
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, expand

GRID_COLUMNS = 8
GRID_IMAGES, GRID_PIXELS = 256, 256
"""Images in the grid, and the side of each, at most: the grid of thousands of large ones would take gigabytes."""


def define_flags() -> None:
    define_embedding(several=True)
    define_prompts("Prompt with the class word; may be repeated.")
    flags.DEFINE_string(
        "out", "pictures", f"Folder for the images and a grid of the first {GRID_IMAGES}; a second call adds to it."
    )
    flags.DEFINE_string("negative_prompt", "", "Prompt to steer away from; never sees the concept.")
    flags.DEFINE_bool("check", False, "Sample nothing; print how far the concept moves each prompt's text states.")
    define_sampling()


def main(arguments: flags.FlagValues) -> int:
    """Writes `<prompt-slug>_<seed>.png` for every prompt and seed, and a grid of them."""
    given, strength = given_concepts(arguments), given_strength(arguments)
    concepts = {source: concept.at(strength) for source, concept in given.items()}
    check_composition(list(concepts.values()))
    acting = [concept for concept in concepts.values() if acts(concept)]
    sampler = SamplerConfig() if arguments.check else given_sampler(arguments, concepts)
    prompts = given_prompts(arguments)
    if not arguments.out:  # a shell variable that is not set
        raise UserError("--out: empty; expected a folder; . is this one")
    out = expand(arguments.out)
    if not arguments.check:
        make_out(out)
    pipe = Pipeline.for_concepts(concepts, model_of(concepts, arguments.model or "", arguments.dtype))
    if arguments.check:
        for warning in warnings(pipe.base, prompts, list(concepts.values())):
            warn(warning)
        for concept in concepts.values():
            others = [other for other in acting if other is not concept]
            lines = movement(pipe.base, prompts, concept, others)
            print(*(f"{concept.class_word}: {line}" if others else line for line in lines), sep="\n")
        return 0
    request = SampleRequest.every(prompts, given_seeds(arguments), sampler, arguments.negative_prompt)
    rows = write_images(out, request, pipe.sample(request, list(concepts.values())))
    path = free_grid_name(out)
    write_atomically(path, wrapped_grid(rows).save)
    count, shown = len(request.prompts), sum(map(len, rows.values()))
    print(f"{count} images in {out}, {'together' if shown == count else f'the first {shown} together'} in {path}")
    return 0


def write_images(out: AnyPath, request: SampleRequest, images) -> dict[str, list[np.ndarray]]:
    """Writes each image as soon as it is sampled; returns the first GRID_IMAGES by prompt, reduced for the grid."""
    prompts = list(dict.fromkeys(request.prompts))
    slugs = dict(zip(prompts, unique_slugs(prompts), strict=True))
    rows: dict[str, list[np.ndarray]] = {}
    left = GRID_IMAGES
    named = zip(request.prompts, request.seeds, images, strict=True)
    for prompt, seed, image in tqdm(named, total=len(request.prompts), unit=" images"):
        write_atomically(out / f"{slugs[prompt]}_{seed}.png", Image.fromarray(image).save)
        if left:
            rows.setdefault(prompt, []).append(reduced(image, GRID_PIXELS))
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
