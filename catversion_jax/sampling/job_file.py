"""The file of `generate --jobs`: pictures to sample, each with concepts of its own; one JSON object per line."""

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from catversion_jax.base.prompt_weights import weighted_parts
from catversion_jax.base.sampler_config import MAX_STRENGTH
from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError, told
from catversion_jax.utils.paths import AnyPath
from catversion_jax.utils.settings import is_text

MAX_JOBS = 10**6
EXPECTED = (
    'expected an object such as {"prompt": "a photo of a teapot", "concepts": ["runs/teapot"]}; optionally strengths '
    "(a number for each concept) and seed (0 to 2^32 - 1)"
)

Prompt = Annotated[str, Meta(pattern=r"\S", max_length=10_000)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
Strength = Annotated[float, Meta(ge=0, le=MAX_STRENGTH)]


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One picture to sample."""

    prompt: Prompt
    concepts: tuple[str, ...] = ()  # as --embedding takes them; a relative path starts at the file's folder
    strengths: tuple[Strength | None, ...] = ()  # null: as the concept records it
    seed: Seed = 0


def read_jobs(path: AnyPath) -> Iterator[tuple[str, Job]]:
    """Yields the jobs of a file, each with the place that error messages name: the file and the line.

    Raises UserError for a line that is not valid, and for a file without jobs.
    """
    count = 0
    for where, text in records.given_lines(path):
        job = records.decode(text, Job, where, EXPECTED)
        check_job(job, where)
        count += 1
        if count > MAX_JOBS:
            raise UserError(f"{where}: more than {MAX_JOBS} jobs; give the others in another call")
        yield where, job
    if not count:
        raise UserError(f"{path}: no lines; {EXPECTED}")


def check_job(job: Job, where: str) -> None:
    """Raises UserError for values that are no job's together."""
    if not is_text(job.prompt) or not all(map(is_text, job.concepts)):
        raise UserError(f"{where}: holds a NUL or half of a character; expected text in UTF-8")
    with told(where):
        weighted_parts(job.prompt)
    if len(set(job.concepts)) < len(job.concepts) or "" in job.concepts:
        raise UserError(f"{where}: concepts {list(job.concepts)}: expected each once")
    if job.strengths and len(job.strengths) != len(job.concepts):
        raise UserError(
            f"{where}: {len(job.strengths)} strengths for {len(job.concepts)} concepts; expected one for each, or none"
        )
