"""`catversion bench`: times the training step of C concepts with batches of B; prints a table, also as JSON."""

import datetime
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from catversion_jax.base.pipeline import drawing_dtype
from catversion_jax.bench import torch_step
from catversion_jax.bench.absent import CHIPS
from catversion_jax.bench.forecast import forecast_pictures, forecast_step, picture_table, step_table
from catversion_jax.bench.kernels import compare_kernels, parity_table
from catversion_jax.bench.machine import device_name
from catversion_jax.bench.measure import REPETITIONS, Size, measure_size
from catversion_jax.bench.picture_rate import PictureRate, measure_pictures, rate_table
from catversion_jax.bench.random_model import SD15
from catversion_jax.bench.row import Row, bench_table
from catversion_jax.bench.service_load import Load, load_table, measure_batch, measure_service
from catversion_jax.cli.flags import checked_config, define_config
from catversion_jax.config import OF_A_RUN, Config, from_config_dict, stable_diffusion
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import check_writable, write_atomically
from catversion_jax.utils.paths import AnyPath, expand

SIZES = "1x2,4x2,16x2,32x2"
OF_THE_STEP = ("vs", "trace", "steps")  # its timing
EXCLUDES = {
    "service": ("kernels", "pictures", "for", *OF_THE_STEP),
    "kernels": ("pictures", "for", *OF_THE_STEP),
    "pictures": OF_THE_STEP,
    "for": OF_THE_STEP,
}
"""Flags, and those that would be passed over beside them."""


def define_flags() -> None:
    define_config(
        help="Config file; if not set, the mini model on a CPU and Stable Diffusion 1.5 elsewhere; "
        "--config.KEY=VALUE overrides a key."
    )
    flags.DEFINE_string("sizes", SIZES, "Sizes to time, each CONCEPTSxBATCH, separated by commas.")
    flags.DEFINE_integer(
        "steps",
        None,
        f"Timed steps per size, rounded up to whole dispatches; if not set, {REPETITIONS} dispatches.",
        lower_bound=1,
    )
    flags.DEFINE_enum("vs", None, ["torch"], "Also time the step in PyTorch with diffusers, in turns.")
    flags.DEFINE_enum(
        "for",
        None,
        list(CHIPS),
        "Times nothing: compiles the step for a chip that need not be here, and says what it should cost there.",
    )
    flags.DEFINE_string(
        "pictures",
        None,
        "Numbers of pictures to draw at once, separated by commas, such as 1,8: times the UNet's calls and the decoder "
        "instead of the step, or with --for says what these should cost.",
    )
    flags.DEFINE_bool(
        "kernels", False, "Times nothing: compares this machine's attention kernels with attention in float32."
    )
    flags.DEFINE_string(
        "trace", None, "Folder for a profile of a dispatch of each size, for TensorBoard's XProf; if not set, none."
    )
    flags.DEFINE_string(
        "service",
        None,
        "Load of a service to measure instead, as CONCEPTSxPICTURES, such as 100x500, beside `catversion batch`.",
    )
    flags.DEFINE_integer("clients", 4, "Number of clients that post the load at once.", 1, 256)
    flags.DEFINE_string(
        "out", None, "JSON file for the table and the machine that it was measured on; if not set, none is written."
    )


def main(arguments: flags.FlagValues) -> int:
    """Times each size and prints the table; the row of a size that does not fit in memory says so."""
    check_together(arguments)
    sizes = parse_sizes(arguments.sizes)
    pictures = parse_pictures(arguments.pictures) if arguments.pictures is not None else []
    if arguments.out:
        check_writable(expand(arguments.out))  # before the work
    if arguments.vs:
        check_torch()
        # By default JAX reserves most of a GPU's memory, and PyTorch runs in the same process.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    if arguments.service:
        return bench_service(arguments)
    config = arguments.config and checked_config(arguments, OF_A_RUN)
    if arguments.kernels:
        return bench_kernels(config, arguments.out)
    if chip := arguments["for"].value:
        return bench_for(chip, config, sizes, pictures, arguments.out)
    if pictures:
        return bench_pictures(config, pictures, arguments.out)
    facts = stamp()
    rows: list[Row] = []
    for concepts, batch in (bar := tqdm(sizes, unit=" sizes")):
        bar.set_description(f"{concepts}x{batch}")
        trace = arguments.trace and str(expand(arguments.trace) / f"{concepts}x{batch}")
        size = Size(config, concepts, batch, arguments.steps, arguments.vs is not None, trace)
        of_machine, of_size = measure_size(size)
        facts |= of_machine
        rows += of_size
        # After each size, so that an interrupted run leaves its rows.
        if arguments.out:
            write_facts(expand(arguments.out), facts | {"rows": [asdict(row) for row in rows]})
    print_report({name: value for name, value in facts.items() if name != "config"}, bench_table(rows))
    return 0


def check_together(arguments: flags.FlagValues) -> None:
    """Raises UserError for flags of which one would be passed over."""
    for name, excluded in EXCLUDES.items():
        others = [other for other in excluded if arguments[other].value]
        if arguments[name].value and others:
            raise UserError(f"--{name}: cannot be combined with --{', --'.join(others)}; leave one out")


def bench_for(
    chip: str, config: Config | None, sizes: list[tuple[int, int]], pictures: list[int], out: str | None
) -> int:
    """Compiles each size, or the drawing of pictures, for a chip, and prints what it should cost there."""
    if config is None:
        config = from_config_dict(stable_diffusion(SD15), OF_A_RUN)
    foretell: list[tuple[str, Callable[[], Any]]] = [
        (str(count), partial(forecast_pictures, config, count, chip)) for count in pictures
    ] or [
        (f"{concepts}x{batch}", partial(forecast_step, Size(config, concepts, batch, None, False), chip))
        for concepts, batch in sizes
    ]
    rows = []
    # Closed, its line ends before that of an error.
    with tqdm(foretell, unit=" sizes") as bar:
        for size, forecast in bar:
            bar.set_description(size)
            rows.append(forecast())
    facts = stamp() | {"chip": CHIPS[chip].name}
    if out:
        write_facts(expand(out), facts | {"rows": [asdict(row) for row in rows]})
    print_report(facts, (picture_table if pictures else step_table)(rows))
    return 0


def bench_pictures(config: Config | None, pictures: list[int], out: str | None) -> int:
    """Times the drawing of so many pictures at once, and prints a table."""
    facts, rows = stamp(), list[PictureRate]()
    with tqdm(pictures, unit=" sizes") as bar:
        for count in bar:
            of_machine, row = measure_pictures(config, count)
            facts |= of_machine
            rows.append(row)
            if out:
                write_facts(expand(out), facts | {"rows": [asdict(row) for row in rows]})
    print_report(facts, rate_table(rows))
    return 0


def bench_kernels(config: Config | None, out: str | None) -> int:
    """Compares the kernels in the dtype of a config; returns 1 if one is further from float32 than its tolerance."""
    dtype = config.model.dtype if config else drawing_dtype()
    rows = compare_kernels(dtype)
    facts = stamp() | {"device": device_name(), "dtype": dtype}
    if out:
        write_facts(expand(out), facts | {"rows": [asdict(row) for row in rows]})
    print_report(facts, parity_table(rows))
    for row in rows:
        if not row.agrees:
            print(f"{row.kernel} at {row.shape}: further from float32 than {row.tolerance:g}", file=sys.stderr)
    return 0 if all(row.agrees for row in rows) else 1


def bench_service(arguments: flags.FlagValues) -> int:
    """Measures a service under load, and prints the table."""
    match = re.fullmatch(r"([1-9]\d{0,5})x(\d{1,6})", arguments.service)
    if match is None:
        raise UserError(f"--service={arguments.service}: expected CONCEPTSxPICTURES, such as 100x500")
    concepts, pictures = int(match[1]), int(match[2])
    load, config = Load(concepts, pictures, arguments.clients), checked_config(arguments, OF_A_RUN)
    # As they were given: the service and the batch have processes of their own.
    given = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
    facts = stamp() | {
        "batch": measure_batch(given, load, config),
        "service": measure_service(given, load, config),
    }
    if arguments.out:
        write_facts(expand(arguments.out), facts)
    print(load_table(facts))
    return 0


def stamp() -> dict[str, Any]:
    """Returns what every report begins with."""
    return {"date": datetime.date.today().isoformat(), "jax": jax.__version__}


def print_report(facts: dict[str, Any], table: str) -> None:
    print(*(f"{name}: {value}" for name, value in facts.items()), "", table, sep="\n")


def write_facts(out: AnyPath, facts: dict[str, Any]) -> None:
    write_atomically(out, lambda path: path.write_text(json.dumps(facts, indent=1), "utf-8"))


def check_torch() -> None:
    if missing := torch_step.missing():
        raise UserError(f"--vs=torch: no {', no '.join(missing)} here; pip install {' '.join(missing)}")


def parse_sizes(value: str) -> list[tuple[int, int]]:
    """Parses the concepts and the batch of each size."""
    sizes = []
    for size in value.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size.strip())
        if match is None:
            raise UserError(f"--sizes={value}: expected CONCEPTSxBATCH, several separated by commas, such as {SIZES}")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def parse_pictures(value: str) -> list[int]:
    """Parses numbers of pictures."""
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", value):
        raise UserError(f"--pictures={value}: expected numbers of pictures, separated by commas, such as 1,8")
    return [int(count) for count in value.split(",")]
