"""One row of the table: what was measured of a size, what follows from it, and how it is printed."""

import statistics
from dataclasses import dataclass, replace

from catversion_jax.bench.torch_step import RECIPES
from catversion_jax.utils import markdown

OURS = "catversion"
LABELS = {OURS: OURS} | {what: recipe.label for what, recipe in RECIPES.items()}


@dataclass(frozen=True)
class Row:
    """One row of the table. Values that do not apply or are not known are None.

    `flops_per_step` are those of a step over all devices, as XLA counts them: multiplications and additions of the
    matrix products and convolutions, forward and backward to the prefix, and of elementwise operations, a few percent.
    On a CPU they are those of the compiled program. On other devices, library calls and fused attention (cuDNN, Pallas)
    would count as zero there, so they are those of the same step lowered for a CPU, which shows every product; what a
    device's own attention computes twice to save memory is not counted. `bytes_per_step` is what the operations of the
    compiled program read and write, as XLA counts it: more than reaches the memory, because of caches. XLA counts the
    body of a loop over the steps once.
    """

    what: str  # OURS, or a key of RECIPES
    concepts: int
    batch: int
    error: str | None = None  # why there are no numbers
    trace_s: float | None = None  # tracing and lowering, which no cache saves
    compile_cold_s: float | None = None  # by XLA, with an empty persistent cache
    compile_cached_s: float | None = None  # traced again in the same process, then from the persistent cache
    devices: int | None = None  # that the step is split over
    steps_per_dispatch: int | None = None
    repetitions: int | None = None  # timed dispatches
    ms_per_step: float | None = None  # median over the repetitions
    ms_per_step_smallest: float | None = None
    images_per_s: float | None = None  # at the median
    concepts_per_hour: float | None = None  # at the config's train.steps of `batch` images
    flops_per_step: float | None = None
    bytes_per_step: float | None = None
    flops_per_byte: float | None = None
    peak_flops_per_s: float | None = None  # of the matrix products of all devices
    utilisation: float | None = None  # share of that peak, at the median
    peak_memory_bytes: float | None = None  # of one device
    peak_memory_from: str | None = None  # `device`: what its allocator held; `program`: what the compiled step asks for
    ours_per_theirs: float | None = None  # ratio of the times of a step, medians
    ours_per_theirs_smallest: float | None = None


def ratio(value: float | None, by: float | None) -> float | None:
    """Returns the quotient; None if a value is not known or the divisor is zero."""
    return value / by if value and by else None


def with_flops(row: Row, flops: float | None) -> Row:
    """Returns the row with its FLOPs and what follows from them; its times, if it has any, must be set already."""
    rate = ratio(flops and flops * 1e3, row.ms_per_step)
    return replace(
        row,
        flops_per_step=flops,
        flops_per_byte=ratio(flops, row.bytes_per_step),
        utilisation=ratio(rate, row.peak_flops_per_s),
    )


def with_times(row: Row, seconds: list[float], train_steps: int) -> Row:
    median, smallest = (pick(seconds) / (row.steps_per_dispatch or 1) for pick in (statistics.median, min))
    images_per_s = row.concepts * row.batch / median
    timed = replace(
        row,
        ms_per_step=median * 1e3,
        ms_per_step_smallest=smallest * 1e3,
        images_per_s=images_per_s,
        concepts_per_hour=images_per_s * 3600 / (row.batch * train_steps),
    )
    return with_flops(timed, row.flops_per_step)


def with_ratios(rows: list[Row]) -> list[Row]:
    """Returns the rows with the ratio of our times to theirs in theirs; the first row is ours."""
    first, *others = rows
    return [
        first,
        *(
            replace(
                row,
                ours_per_theirs=ratio(first.ms_per_step, row.ms_per_step),
                ours_per_theirs_smallest=ratio(first.ms_per_step_smallest, row.ms_per_step_smallest),
            )
            for row in others
        ),
    ]


def format_number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit, form)


COLUMNS = {
    "concepts x batch": lambda row: f"{row.concepts}x{row.batch}",
    "what": lambda row: LABELS[row.what],
    "trace s": lambda row: format_number(row.trace_s, ".1f"),
    "compile s, cold": lambda row: format_number(row.compile_cold_s, ".1f"),
    "from the cache": lambda row: format_number(row.compile_cached_s, ".1f"),
    "ms/step": lambda row: row.error or format_number(row.ms_per_step, ".1f"),
    "smallest": lambda row: format_number(row.ms_per_step_smallest, ".1f"),
    "images/s": lambda row: format_number(row.images_per_s, ".1f"),
    "concepts/h": lambda row: format_number(row.concepts_per_hour, ".1f"),
    "GFLOP/step": lambda row: format_number(row.flops_per_step, ".1f", 1e9),
    "of the peak": lambda row: format_number(row.utilisation, ".1%"),
    "GB/step": lambda row: format_number(row.bytes_per_step, ".2f", 1e9),
    "FLOP/byte": lambda row: format_number(row.flops_per_byte, ".1f"),
    "peak GiB": lambda row: format_number(row.peak_memory_bytes, ".2f", 2**30),
    "by": lambda row: row.peak_memory_from or "",
    "ours/theirs": lambda row: format_number(row.ours_per_theirs, ".2f"),
    "of the smallest": lambda row: format_number(row.ours_per_theirs_smallest, ".2f"),
}


def bench_table(rows: list[Row]) -> str:
    """Returns the rows as a Markdown table."""
    return markdown.table(list(COLUMNS), ([cell(row) for cell in COLUMNS.values()] for row in rows))
