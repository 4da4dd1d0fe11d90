"""`catversion generate --jobs`: samples the pictures of a file, those of different concepts together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import msgspec
from absl import flags
from tqdm import tqdm

from catversion_jax.api.pipeline import Pipeline
from catversion_jax.base.pipeline import ModelConfig, drawing_dtype
from catversion_jax.cli.flags import given_sampler, load_concept
from catversion_jax.cli.pictures import lora_sources, save_picture, with_loras
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.concept_model import model_of, warnings
from catversion_jax.methods.model_names import is_on_hub
from catversion_jax.sampling.image_names import slug
from catversion_jax.sampling.job_file import Job, read_jobs
from catversion_jax.sampling.picture_record import PictureRecord
from catversion_jax.sampling.picture_sources import add_sources
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError, listed, told
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, entries, expand, named_in

INDEX = "index.jsonl"
"""Tells which picture is which job's."""
NOT_WITH_JOBS = (
    "check",
    "denoise",
    "embedding",
    "image",
    "image_mask",
    "like",
    "num",
    "prompt",
    "prompts_file",
    "seed",
    "strength",
)
"""Flags of what each job says for itself, or has not."""
MOST_WARNINGS = 10


class IndexLine(msgspec.Struct, frozen=True):
    """A line of the index."""

    job: str  # file and line
    file: str


def main(arguments: flags.FlagValues, out: AnyPath) -> int:
    """Writes `<prompt-slug>_<key>_<seed>.png` for each job whose picture is not there, and INDEX."""
    if given := [name for name in NOT_WITH_JOBS if arguments[name].present]:
        raise UserError(f"--{given[0]}: not with --jobs, whose lines say what to sample; leave it out")
    path = expand(arguments.jobs)
    jobs = dict(read_jobs(path))
    loaded, of_each = concepts_of(path, jobs)
    sampler = given_sampler(arguments, loaded)
    named = arguments.model or ""
    dtype = arguments.dtype or drawing_dtype()
    model = model_of(loaded, named, dtype) if loaded else ModelConfig(named, dtype=dtype)
    pipe = with_loras(Pipeline.for_concepts(loaded, model), arguments)
    warn_of_prompts(pipe, jobs, of_each)
    size = (arguments.width or 0, arguments.height or 0)
    prompts, seeds = (tuple(getattr(job, name) for job in jobs.values()) for name in ("prompt", "seed"))
    request = SampleRequest(prompts, seeds, sampler, arguments.negative_prompt, *size)
    pictures = list(pipe.records(request, of_each))
    names = [f"{slug(picture.prompt)}_{picture.key}_{picture.seed}.png" for picture in pictures]
    add_sources(out, loaded, pipe.model.path, {}, lora_sources(pipe, arguments))
    check_names(names, pictures, list(jobs))
    add_to_index(out, path, dict(zip(jobs, names, strict=True)))
    # A name tells prompt, settings and concepts: one that is there is taken for the one that is asked for.
    there = {entry.name for entry, is_folder in entries(out) if not is_folder}
    left = [i for name, i in {name: i for i, name in enumerate(names)}.items() if name not in there]
    asked = replace(request, prompts=tuple(prompts[i] for i in left), seeds=tuple(seeds[i] for i in left))
    images = pipe.sample_each(asked, [of_each[i] for i in left])
    for index, image in tqdm(images, total=len(left), unit=" images"):
        save_picture(out / names[left[index]], image, pictures[left[index]])
    print(f"{len(left)} images in {out}, {len(jobs) - len(left)} were there; {INDEX} tells which is which job's")
    return 0


def check_names(names: Sequence[str], pictures: Sequence[PictureRecord], places: Sequence[str]) -> None:
    """Raises UserError for two jobs whose pictures would have one name by chance."""
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        other = first.setdefault(name, i)
        if pictures[other] != pictures[i]:
            raise UserError(f"{places[i]}: its picture would have the name of that of {places[other]}; change the seed")


def add_to_index(out: AnyPath, path: AnyPath, names: Mapping[str, str]) -> None:
    """Writes the file names of the pictures of a jobs file's lines to the index; other files' lines stay."""
    others = [line for line in records.read_lines(out / INDEX, IndexLine) if not line.job.startswith(f"{path}:")]
    lines = [*others, *(IndexLine(place, name) for place, name in names.items())]
    text = "".join(records.encode(line) + "\n" for line in lines)
    write_atomically(out / INDEX, lambda file: file.write_text(text, "utf-8"))


def concepts_of(path: AnyPath, jobs: Mapping[str, Job]) -> tuple[dict[str, Concept], list[tuple[Concept, ...]]]:
    """Returns the concepts of jobs by their sources, each loaded once, and those of each job at its strengths.

    Raises UserError, naming the job, for a concept that cannot be loaded and for concepts that cannot share a prompt.
    """
    loaded: dict[str, Concept] = {}
    at_strength: dict[tuple[str, float | None], Concept] = {}
    of_each = []
    for place, job in jobs.items():
        with told(place):
            concepts = []
            for source, strength in zip_longest(job.concepts, job.strengths):
                named = source_of(path, source)
                if named not in loaded:
                    loaded[named] = load_concept(named)
                key = (named, strength)
                # One object for each, by which images that share it are told.
                concepts.append(at_strength.setdefault(key, loaded[named].at(strength)))
            check_composition(concepts)
        of_each.append(tuple(concepts))
    return loaded, of_each


def source_of(path: AnyPath, concept: str) -> str:
    """Returns where a concept is that a file names: relative to the file, unless it is a name on Hugging Face."""
    # A name like runs/mug, beside a folder of runs, is a path that was misspelt.
    is_here = named_in(path.parent, concept.split("/")[0]).exists()
    return concept if is_on_hub(concept) and not is_here else str(named_in(path.parent, concept))


def warn_of_prompts(pipe: Pipeline, jobs: Mapping[str, Job], of_each: Sequence[Sequence[Concept]]) -> None:
    """Warns of likely mistakes, such as a prompt without the class word; each with the places of its jobs."""
    places: dict[str, list[str]] = {}
    for (place, job), concepts in zip(jobs.items(), of_each, strict=True):
        for warning in warnings(pipe.base, [job.prompt], concepts) if concepts else ():
            places.setdefault(warning, []).append(place)
    for warning, found in list(places.items())[:MOST_WARNINGS]:
        warn(f"{listed(found)}: {warning}")
    if len(places) > MOST_WARNINGS:
        warn(f"{len(places) - MOST_WARNINGS} further warnings of this kind are left out")
