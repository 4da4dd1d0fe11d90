"""`catversion study rivals`, `ablation` or `together`: makes a table of docs/results.md, from training to the numbers.

Each row is kept in --out once it is trained and scored: rerun the command to resume.
"""

import datetime
import textwrap
import time

import jax
from absl import flags

from catversion_jax.cli.flags import checked_config, define_config
from catversion_jax.config import OF_A_RUN
from catversion_jax.config.shipped import config_source
from catversion_jax.data import concept_sets
from catversion_jax.evaluation import encoders
from catversion_jax.evaluation.evaluation import UNRELATED, versions
from catversion_jax.evaluation.samples import EvaluationConfig
from catversion_jax.evaluation.scores import Encoders
from catversion_jax.study import tables
from catversion_jax.study.accuracy import read_world
from catversion_jax.study.scoring import Scorer
from catversion_jax.study.study import Study, named
from catversion_jax.study.training import SLOTS
from catversion_jax.training.run import load_model
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import expand

POSITIONALS = ("TABLE",)


def define_flags() -> None:
    define_config(
        config_source("mini"),
        "Config that every row starts from: a file or a shipped one; --config.KEY=VALUE overrides a key. "
        "Default: mini.",
    )
    flags.DEFINE_string(
        "concepts", None, "Folder of concepts with train/, heldout/ and their masks. Default: the shipped ones."
    )
    flags.DEFINE_string("out", "runs/study", "Folder for all results; what it holds already is not computed again.")
    flags.DEFINE_bool("quick", False, "Compute a smaller table, with fewer concepts, steps and prompts.")


def main(arguments: flags.FlagValues, name: str) -> int:
    """Computes the table; writes table.md and grids of images."""
    if name not in tables.TABLES:
        raise UserError(f"{name}: no such table; expected one of {', '.join(tables.TABLES)}")
    start = time.monotonic()
    study = open_study(arguments, name)
    study.claim()
    made = tables.TABLES[name].make(study)
    text = f"{header(name, study, (time.monotonic() - start) / 60)}\n{made.text}"
    write_atomically(study.out / "table.md", lambda path: path.write_text(text))
    for grid, image in made.grids.items():
        write_atomically(study.out / f"{grid}.png", image.save)
    print(f"{text}\n{study.out / 'table.md'}; images: {', '.join(str(study.out / f'{n}.png') for n in made.grids)}")
    return 0


def open_study(arguments: flags.FlagValues, name: str) -> Study:
    config = checked_config(arguments, OF_A_RUN)
    kind = tables.TABLES[name]
    scale = kind.quick if arguments.quick else kind.full
    folders = named(concept_sets.find_concepts(arguments.concepts or concept_sets.SHIPPED), scale.concepts)
    evaluation = EvaluationConfig(
        config.sample.sampler, tuple(range(scale.seeds)), None, UNRELATED[: scale.unrelated], "", config.model.dtype
    )
    scorer = Scorer(
        load_model(config, SLOTS),
        Encoders(encoders.of_model(config.model.folder), None),
        evaluation,
        config.sample.prompts[: scale.prompts],
        read_world(config.model.folder),
    )
    out = expand(arguments.out) / (f"{name}-quick" if arguments.quick else name)
    return Study(config, folders, scale, out, scorer)


def header(name: str, study: Study, minutes: float) -> str:
    """Returns the text above the table, which has to be reported with the numbers."""
    evaluation, train = study.scorer.config, study.config.train
    sampler, (device, *_) = evaluation.sampler, jax.devices()
    lines = (
        f"`catversion study {name}`, {datetime.date.today()}, on {device.device_kind};",
        f"{minutes:.0f} minutes in its last run.",
        f"Concepts: {', '.join(folder.name for folder in study.folders)};",
        f"{study.scale.steps or train.steps} steps of {train.batch_size}, seed {study.config.seed}.",
        f"Images: {len(study.scorer.templates)} prompts x seeds 0 to {study.scale.seeds - 1},",
        f"{sampler.steps} steps, guidance {sampler.guidance};",
        f"unrelated: {', '.join(evaluation.unrelated) or 'none'}.",
        "In brackets, 95 % bootstrap intervals over the prompts of all concepts.",
        ", ".join(f"{package} {version}" for package, version in versions().items()),
    )
    return textwrap.fill(" ".join(lines), 120) + "\n"
