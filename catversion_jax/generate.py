"""`catversion generate`: draw pictures with a learned concept."""

import hashlib
import re
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from catversion_jax import artifact, sampling, text
from catversion_jax.conditioning import movement
from catversion_jax.config import expand
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.grid import grid
from catversion_jax.pipeline import DTYPES, MINI, Pipeline, load
from catversion_jax.schedulers import SCHEDULERS

SLUG_LENGTH = 80
GRID_COLUMNS = 8
MAX_PROMPTS_BYTES = 2**20


def define_flags() -> None:
    flags.DEFINE_string("embedding", None, "A run directory of catversion train, or its concept.safetensors.")
    flags.DEFINE_multi_string("prompt", [], "A prompt with the class word; may be given several times.")
    flags.DEFINE_string("prompts_file", None, "A text file with one prompt a line.")
    flags.DEFINE_integer("num", 4, "Pictures per prompt.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Of the first picture; the next ones count up.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_string("out", "pictures", "The folder for the pictures; a second call adds to it.")
    flags.DEFINE_string("negative_prompt", "", "What to steer away from; never sees the concept.")
    flags.DEFINE_float("guidance", 5.0, "Scale of classifier-free guidance; 1: none.", lower_bound=0)
    flags.DEFINE_string("scheduler", "", f"One of {', '.join(SCHEDULERS)}. Default: the model's own.")
    flags.DEFINE_integer("steps", 30, "Of the scheduler.", lower_bound=1, upper_bound=1000)
    flags.DEFINE_float("strength", 1.0, "Of the concept, 0 to 1; 0: the base model.", lower_bound=0, upper_bound=1)
    flags.DEFINE_string("model", None, "The base model's folder. Default: the one the concept was learned on.")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the computation.")
    flags.DEFINE_integer("batch_size", 4, "Pictures at once.", lower_bound=1)
    flags.DEFINE_bool("check", False, "Draw nothing; print how far the concept moves each prompt's text states.")


def main(arguments: flags.FlagValues) -> int:
    """Write `<prompt-slug>_<seed>.png` for every prompt and seed, and a grid of them."""
    if not arguments.embedding:
        raise UserError("--embedding: missing; expected a run directory of catversion train")
    concept = artifact.load(expand(arguments.embedding))
    prompts = read_prompts(arguments)
    seeds = [(arguments.seed + i) % 2**32 for i in range(arguments.num)]
    out = expand(arguments.out)
    if not arguments.check:
        make_folder(out)
    pipeline = load_model(arguments, concept, prompts, arguments.dtype)
    if arguments.check:
        print(*movement(pipeline, prompts, concept, arguments.strength), sep="\n")
        return 0

    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    config = sampling.SamplerConfig(arguments.steps, arguments.guidance, arguments.batch_size, arguments.scheduler)
    pictures = sampling.paint(
        pipeline, *zip(*jobs, strict=True), config, concept, arguments.strength, arguments.negative_prompt
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
    arguments: flags.FlagValues, concept: artifact.Concept, prompts: list[str], dtype: str = "float32"
) -> Pipeline:
    """The base model of --model or the concept's own; prints what makes the concept do less than one would think."""
    model = arguments.model or concept.model_path
    known = {key: getattr(concept, f"model_{key}") for key in ("revision", "variant", "prediction_type")}
    pipeline = load(model, dtype, **({} if arguments.model else known))
    encoders = [encoder.config for encoder in pipeline.networks.text]
    source = str(expand(arguments.embedding))
    unsure = artifact.check_model(concept, pipeline.fingerprint, encoders, source, model or str(MINI))
    for warning in unsure + warnings(pipeline, concept, prompts, arguments.strength):
        print(f"catversion: warning: {warning}")
    return pipeline


def make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); --out takes a folder") from None
    return path


def warnings(pipeline: Pipeline, concept: artifact.Concept, prompts: list[str], strength: float) -> list[str]:
    """One line for each thing that makes the concept do less than one would think."""
    lines = []
    if strength == 0:
        lines.append("--strength=0 removes the concept: what follows is the base model's")
    places = text.find_word(pipeline.tokenizer(prompts), pipeline.tokenizer.word(concept.class_word))
    without = [prompt for prompt, place in zip(prompts, places, strict=True) if place < 0]
    if without and concept.class_word:
        listed = ", ".join(repr(prompt) for prompt in without)
        lines.append(f"without the class word {concept.class_word!r}, which the concept was learned with: {listed}")
    cut = [prompt for prompt in prompts if pipeline.tokenizer.is_cut(prompt)]
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
