"""`catversion train`: trains a concept on a folder of photos."""

from collections.abc import Sequence

import numpy as np
from absl import flags

from catversion_jax.cli.flags import checked_config, define_config
from catversion_jax.config import Config
from catversion_jax.data.photos import Photo, describe_count, describe_masks
from catversion_jax.methods import concept_file
from catversion_jax.training.previews import preview_of, sample_grid, sample_prompts
from catversion_jax.training.run import Watch, load_model, train
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.status import DONE, ConceptStatus, write_status
from catversion_jax.training.trackers import TRACKERS, tracked
from catversion_jax.utils.files import write_atomically


def define_flags() -> None:
    define_config()
    flags.DEFINE_bool("resume", False, "Resume the run in config.run_dir from its last checkpoint.")
    flags.DEFINE_multi_enum(
        "track",
        [],
        list(TRACKERS),
        "Package that the curves and images also go to, with its own settings and login.",
    )
    flags.DEFINE_string("push_to_hub", None, "Name on Hugging Face (owner/name) to upload the finished concept to.")


def main(arguments: flags.FlagValues) -> int:
    config = checked_config(arguments)
    status = run_training(config, arguments.resume, arguments.track)
    run = RunDir.of(config)
    if status == 0 and arguments.push_to_hub:
        print(f"shared:   {concept_file.load(run.path).push_to_hub(arguments.push_to_hub, run.preview)}")
    return status


def print_photos(photos: Sequence[Photo]) -> None:
    """Prints how many photos there are, and their masks, before the training: while nothing is lost yet."""
    print(f"photos:   {describe_count(photos)}", flush=True)
    for line in describe_masks(photos):
        print(line, flush=True)


def run_training(config: Config, resume: bool = False, track: Sequence[str] = ()) -> int:
    """Trains, or resumes, and writes the sample grid. Returns 0, or 128 + the number of the interrupting signal."""
    run = RunDir.of(config)
    run.check(config, resume)
    if run.finished:
        print(f"{run.path}: finished already; nothing to do")
        return 0
    with tracked(track, config, run) as trackers:
        pipeline = load_model(config)
        outcome = train(config, run, pipeline, Watch(print_photos, trackers))
        concept = outcome.concept
        if outcome.interrupted_by:
            print(f"{run.path}: stopped at step {concept.steps} of {config.train.steps}; continue with --resume")
            return 128 + outcome.interrupted_by
        base, personalized = (sample_prompts(config, pipeline, concepts) for concepts in ((), (concept,)))
        write_atomically(run.preview, preview_of(personalized, config).save)
        write_status(run.path, ConceptStatus(run.path.name, DONE, photos=len(outcome.photos), steps=concept.steps))
        # Last, as a run that has it is finished.
        samples = sample_grid(config, outcome.photos, base, personalized)
        write_atomically(run.samples, samples.save)
        for tracker in trackers:
            tracker.image(concept.steps, "samples", np.asarray(samples))
    print(f"concept:  {run.artifact}\nimages:   {run.samples}")
    print(f"curves:   tensorboard --logdir {run.events}")
    return 0
