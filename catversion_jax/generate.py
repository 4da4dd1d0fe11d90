"""`catversion generate`: draw pictures with a learned concept."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from catversion_jax import artifact, drawing_flags, sampling
from catversion_jax.conditioning import movement
from catversion_jax.config import expand
from catversion_jax.ensemble import ensemble
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.grid import grid
from catversion_jax.pipeline import MINI, Pipeline, load
from catversion_jax.text import without_word

SLUG_LENGTH = 80
GRID_COLUMNS = 8
MAX_PROMPTS_BYTES = 2**20


def define_flags() -> None:
    flags.DEFINE_multi_string(
        "embedding", [], "A run directory of catversion train, or its concept.safetensors; several: in one prompt."
    )
    flags.DEFINE_multi_string("prompt", [], "A prompt with the class word; may be given several times.")
    flags.DEFINE_string("prompts_file", None, "A text file with one prompt a line.")
    flags.DEFINE_string("out", "pictures", "The folder for the pictures; a second call adds to it.")
    flags.DEFINE_string("negative_prompt", "", "What to steer away from; never sees the concept.")
    flags.DEFINE_bool("check", False, "Draw nothing; print how far the concept moves each prompt's text states.")
    drawing_flags.define()
    flags.adopt_module_key_flags(drawing_flags)


def main(arguments: flags.FlagValues) -> int:
    """Write `<prompt-slug>_<seed>.png` for every prompt and seed, and a grid of them."""
    if not arguments.embedding:
        raise UserError("--embedding: missing; expected a run directory of catversion train")
    concepts = {str(path): artifact.load(path) for path in map(expand, arguments.embedding)}
    ensemble(list(concepts.values()))  # refuses those that cannot share a prompt
    prompts = read_prompts(arguments)
    out = expand(arguments.out)
    if not arguments.check:
        make_folder(out)
    pipeline = load_model(arguments, concepts, prompts, arguments.dtype)
    personal = list(concepts.values())
    if arguments.check:
        print(*movement(pipeline, prompts, personal, arguments.strength), sep="\n")
        return 0

    jobs = [(prompt, seed) for prompt in prompts for seed in drawing_flags.seeds(arguments)]
    config = drawing_flags.sampler(arguments)
    pictures = sampling.paint(
        pipeline, *zip(*jobs, strict=True), config, personal, arguments.strength, arguments.negative_prompt
    )
    slugs = dict(zip(prompts, unique_slugs(prompts), strict=True))
    rows: dict[str, list[np.ndarray]] = {prompt: [] for prompt in prompts}
    for (prompt, seed), picture in tqdm(zip(jobs, pictures, strict=True), total=len(jobs), unit=" pictures"):
        write_atomically(out / f"{slugs[prompt]}_{seed}.png", Image.fromarray(picture).save)
        rows[prompt].append(picture)
    path = free_name(out)
    write_atomically(path, wrapped_grid(rows).save)
    print(f"{len(jobs)} pictures in {out}, together in {path}")
    return 0


def read_prompts(arguments: flags.FlagValues) -> list[str]:
    """The prompts of --prompt and --prompts_file, each once."""
    prompts = list(arguments.prompt)
    if arguments.prompts_file:
        path = expand(arguments.prompts_file)
        try:
            if path.stat().st_size > MAX_PROMPTS_BYTES:
                raise UserError(f"{path}: larger than 1 MiB; expected one prompt a line")
            prompts += path.read_text("utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; --prompts_file takes a text file, one prompt a line") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; expected one prompt a line") from None
    prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    if not prompts:
        raise UserError("--prompt: missing; expected a prompt with the class word, or --prompts_file")
    return prompts


def load_model(
    arguments: flags.FlagValues, concepts: dict[str, artifact.Concept], prompts: list[str], dtype: str = "float32"
) -> Pipeline:
    """The base model of --model or the own one of the concepts, by their sources; prints what makes them do less than
    one would think."""
    pipeline, unsure = open_model(concepts, arguments.model, dtype)
    for warning in unsure + warnings(pipeline, list(concepts.values()), prompts, arguments.strength):
        print(f"catversion: warning: {warning}")
    return pipeline


def open_model(
    concepts: Mapping[str, artifact.Concept], model: str | None, dtype: str, load: Callable[..., Pipeline] = load
) -> tuple[Pipeline, list[str]]:
    """The base model, the first concept's own where `model` names none, and what to warn of. Raises UserError where it
    is not the one that each of the concepts, which are given by their sources, was learned on."""
    first, *_ = concepts.values()
    path = model or first.model_path
    known = {key: getattr(first, f"model_{key}") for key in ("revision", "variant", "prediction_type")}
    pipeline = load(path, dtype, **({} if model else known))
    check = partial(
        artifact.check_model, fingerprint=pipeline.fingerprint, networks=pipeline.networks, model=path or str(MINI)
    )
    return pipeline, [line for source, concept in concepts.items() for line in check(concept, source=source)]


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); --out takes a folder") from None
    return path


def warnings(
    pipeline: Pipeline, concepts: Sequence[artifact.Concept], prompts: list[str], strength: float
) -> list[str]:
    """One line for each thing that makes the concepts do less than one would think."""
    lines = []
    if strength == 0:
        lines.append("--strength=0 removes the concept: what follows is the base model's")
    for word in (concept.class_word for concept in concepts):
        if word and (without := without_word(pipeline.tokenizer, word, prompts)):
            listed = ", ".join(repr(prompt) for prompt in without)
            lines.append(f"without the class word {word!r}, which the concept was learned with: {listed}")
    given = ensemble(concepts).prompt
    cut = [prompt for prompt in prompts if pipeline.tokenizer.is_cut(given(prompt))]
    if cut:
        lines.append(f"cut to {pipeline.tokenizer.length} tokens: {', '.join(repr(prompt) for prompt in cut)}")
    return lines


def slug(prompt: str) -> str:
    """A file name of a prompt; a cut one gets a hash, so that prompts with one beginning stay apart."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    if words and len(words) <= SLUG_LENGTH:
        return words
    return f"{words[:SLUG_LENGTH].rstrip('-')}-{digest(prompt)}".strip("-")


def digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def unique_slugs(prompts: list[str]) -> list[str]:
    """A slug for each prompt; those that differ only in punctuation get a hash."""
    slugs = [slug(prompt) for prompt in prompts]
    return [s if slugs.count(s) == 1 else f"{s}-{digest(prompt)}" for s, prompt in zip(slugs, prompts, strict=True)]


def wrapped_grid(rows: dict[str, list[np.ndarray]]) -> Image.Image:
    """A row a prompt, wrapped at GRID_COLUMNS pictures."""
    labelled = [
        (prompt if i == 0 else "", pictures[i : i + GRID_COLUMNS])
        for prompt, pictures in rows.items()
        for i in range(0, len(pictures), GRID_COLUMNS)
    ]
    return grid([pictures for _, pictures in labelled], [label for label, _ in labelled])


def free_name(out: Path) -> Path:
    """grid.png, or the next free grid_N.png."""
    names = (out / (f"grid_{i}.png" if i else "grid.png") for i in range(10**6))
    return next(path for path in names if not path.exists())
