"""`catversion sweep`: trains and scores settings on a folder of concepts with held-out photos, and writes a table.

A concept is a folder with `concept.json` (class_word, article), `train/` and `heldout/`, as in catversion_jax/concepts.
"""

from dataclasses import replace

from absl import flags

from catversion_jax.cli.flags import checked_config, define_config
from catversion_jax.config import OF_A_RUN
from catversion_jax.data import concept_sets
from catversion_jax.evaluation import encoders
from catversion_jax.evaluation.samples import EvaluationConfig
from catversion_jax.evaluation.scores import Encoders
from catversion_jax.study.accuracy import read_world
from catversion_jax.study.scoring import Scorer
from catversion_jax.study.sweep import known_scores, override, score_setting, sweep_table
from catversion_jax.training.run import load_model
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.identity import claim
from catversion_jax.utils.paths import expand
from catversion_jax.utils.records import append_line, encode


def define_flags() -> None:
    define_config(
        help="Config that every row starts from: a file or a shipped one; --config.KEY=VALUE overrides a key."
    )
    flags.DEFINE_multi_string(
        "try",
        [],
        "Row of the table: KEY=VALUE pairs separated by semicolons; may be repeated; if not set, the config alone.",
    )
    flags.DEFINE_string(
        "concepts", None, "Folder of concepts with concept.json, train/ and heldout/. Default: the shipped ones."
    )
    flags.DEFINE_string(
        "out",
        "runs/sweep",
        "Folder for runs, scores.jsonl, table.md and grids; what it holds already is not computed again.",
    )
    flags.DEFINE_integer("seeds", 2, "Number of images per prompt.", lower_bound=1)
    flags.DEFINE_integer(
        "prompts", 4, "Number of prompts, taken from the start of config.sample.prompts.", lower_bound=1
    )


def main(arguments: flags.FlagValues) -> int:
    """Writes scores.jsonl, with a line for each concept as soon as it is scored, and table.md."""
    config = checked_config(arguments, OF_A_RUN)
    out = expand(arguments.out)
    folders = concept_sets.find_concepts(arguments.concepts or concept_sets.SHIPPED)
    configs = {setting: override(config, setting) for setting in arguments["try"].value or [""]}
    identity = {"config": config.identity(), "seeds": arguments.seeds, "prompts": arguments.prompts}
    claim(out / "sweep.json", identity)
    found = known_scores(out / "scores.jsonl", folders)
    known = {(score.setting, score.concept) for score in found}
    model = config.model
    evaluation = EvaluationConfig(config.sample.sampler, tuple(range(arguments.seeds)), None, (), "", model.dtype)
    shared = Encoders(encoders.of_model(model.folder), None)
    pipeline = load_model(config)
    for setting, changed in configs.items():
        templates = changed.sample.prompts[: arguments.prompts]
        sampled = replace(evaluation, sampler=changed.sample.sampler)
        scorer = Scorer(pipeline, shared, sampled, templates, read_world(model.folder))
        for folder in folders:
            if (setting, folder.name) not in known:
                found.append(score_setting(changed, setting, folder, out, scorer))
                append_line(out / "scores.jsonl", found[-1])
                print(encode(found[-1]))
    table = sweep_table([score for score in found if score.setting in configs])
    write_atomically(out / "table.md", lambda path: path.write_text(table))
    print(table)
    return 0
