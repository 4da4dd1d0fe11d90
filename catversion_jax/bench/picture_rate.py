"""Measures how fast this machine draws pictures, a batch at a time: the UNet's calls and the decoder, one by one."""

import statistics
from dataclasses import dataclass
from typing import Any

import jax

from catversion_jax.base.pipeline import load_pipeline
from catversion_jax.bench.measure import facts_of, find_source, fresh, measured_config, of_memory
from catversion_jax.bench.pictures import PictureBatch, picture_shapes
from catversion_jax.bench.random_model import random_networks, random_params
from catversion_jax.bench.timing import empty_cache, timed
from catversion_jax.config import Config
from catversion_jax.utils import markdown

BATCHES = 3  # that are timed


@dataclass(frozen=True)
class PictureRate:
    """Batches of so many pictures. Values that are not known are None."""

    pictures: int
    error: str | None = None  # why there are no numbers
    calls: int | None = None  # of the UNet
    first_s: float | None = None  # the first batch, with an empty compilation cache
    call_ms: float | None = None  # the median of BATCHES
    decoder_ms: float | None = None
    pictures_per_s: float | None = None


def measure_pictures(config: Config | None, pictures: int) -> tuple[dict[str, Any], PictureRate]:
    """Measures batches of so many pictures in a fresh process; returns the machine and the model, and the rate."""
    try:
        return fresh(draw, config, pictures)
    except (RuntimeError, MemoryError) as error:
        return {}, PictureRate(pictures, of_memory(error))


def draw(config: Config | None, pictures: int) -> tuple[dict[str, Any], PictureRate]:
    config = measured_config(config)
    batch = random_pictures(config, pictures)
    calls = len(batch.trajectory.calls.number)
    facts = facts_of(config) | {
        "sampler": f"{calls} calls of the UNet, guidance {config.sample.guidance:g}",
    }
    with empty_cache():
        first, latents = timed(batch.latents)
        first += timed(batch.pixels, latents)[0]
    times = []
    for _ in range(BATCHES):
        of_calls, latents = timed(batch.latents)
        times.append((of_calls, timed(batch.pixels, latents)[0]))
    of_calls, of_decoder = map(statistics.median, zip(*times, strict=True))
    rate = pictures / statistics.median(map(sum, times))
    return facts, PictureRate(pictures, None, calls, first, 1e3 * of_calls / calls, 1e3 * of_decoder, rate)


def random_pictures(config: Config, pictures: int) -> PictureBatch:
    """Returns a batch of pictures of the config's model, or of random weights if these stand in for it."""
    if find_source(config) is not None:
        pipeline = load_pipeline(config.model)
        networks, params = pipeline.networks, pipeline.params
    else:
        networks = random_networks(config.model.dtype)
        shapes = picture_shapes(networks)
        params = {name: random_params(tree, jax.tree.leaves(tree)[0].dtype) for name, tree in shapes.items()}
    return PictureBatch.random(networks, config.sample.sampler, pictures, params)


COLUMNS = {
    "pictures at once": lambda row: str(row.pictures),
    "pictures/s": lambda row: f"{row.pictures_per_s:.2f}",
    "ms a call of the UNet": lambda row: f"{row.call_ms:.1f}",
    "ms of the decoder": lambda row: f"{row.decoder_ms:.1f}",
    "first batch, with compiling": lambda row: f"{row.first_s:.0f} s",
}


def rate_table(rows: list[PictureRate]) -> str:
    """Returns the rows as a Markdown table; that of one that did not fit says so."""
    cells = (
        [str(row.pictures), row.error, *[""] * (len(COLUMNS) - 2)]
        if row.error
        else [cell(row) for cell in COLUMNS.values()]
        for row in rows
    )
    return markdown.table(list(COLUMNS), cells)
