"""`catversion bench`: how fast the training step is, for C concepts with batches of B; one table, also as JSON."""

import datetime
import json
import os
import re
from dataclasses import asdict
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from catversion_jax.bench import torch_step
from catversion_jax.bench.measure import REPETITIONS, UNSET, Size, measure_size
from catversion_jax.bench.row import Row, to_table
from catversion_jax.cli.flags import checked_config, define_config
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import expand, write_atomically

SIZES = "1x2,4x2,16x2,32x2"


def define_flags() -> None:
    define_config(
        help="A file of configs/; without it, the mini model on a CPU and Stable Diffusion 1.5 elsewhere. "
        "--config.KEY=VALUE changes a key."
    )
    flags.DEFINE_string("sizes", SIZES, "CONCEPTSxBATCH, several separated by commas.")
    flags.DEFINE_integer(
        "steps", None, f"Timed steps for each size, in whole dispatches; {REPETITIONS} dispatches.", lower_bound=1
    )
    flags.DEFINE_enum("vs", None, ["torch"], "Also time PyTorch and diffusers, taking turns.")
    flags.DEFINE_string("out", None, "A JSON file for the table and what it was measured on.")


def main(arguments: flags.FlagValues) -> int:
    """Prints the table; the row of a size that does not fit says so."""
    sizes = parse_sizes(arguments.sizes)
    if arguments.vs:
        check_torch()
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch shall find memory too
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    config = arguments.config and checked_config(arguments, UNSET)
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
    rows: list[Row] = []
    for concepts, batch in (bar := tqdm(sizes, unit=" sizes")):
        bar.set_description(f"{concepts}x{batch}")
        size = Size(config, concepts, batch, arguments.steps, arguments.vs is not None)
        of_machine, of_size = measure_size(size)
        facts |= of_machine
        rows += of_size
        if arguments.out:
            report = json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1)
            write_atomically(expand(arguments.out), lambda path, report=report: path.write_text(report))
    print(*(f"{name}: {value}" for name, value in facts.items() if name != "config"), sep="\n")
    print("", to_table(rows), sep="\n")
    return 0


def check_torch() -> None:
    if missing := torch_step.missing():
        raise UserError(f"--vs=torch: no {', no '.join(missing)} here; pip install {' '.join(missing)}")


def parse_sizes(value: str) -> list[tuple[int, int]]:
    """Concepts and batch of each size."""
    sizes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size.strip()) for size in value.split(",")]
    if not all(sizes):
        raise UserError(f"--sizes={value}: expected CONCEPTSxBATCH, several separated by commas, such as {SIZES}")
    return [(int(size[1]), int(size[2])) for size in sizes]
