"""A run: trains one concept on a folder of photos, in a run folder from which an interrupted run resumes."""

import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from catversion_jax.base import schedulers
from catversion_jax.base.pipeline import BasePipeline, load_pipeline
from catversion_jax.config import Config
from catversion_jax.data import dataset
from catversion_jax.data.photos import Photo, count_photos, training_photos
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.checkpoints import explained, open_checkpoints
from catversion_jax.training.concept_data import check_masks, prepare
from catversion_jax.training.loop import Outputs, enough_memory, loop
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.step import StepConfig, warn_of_idle_devices
from catversion_jax.training.trackers import Tracker
from catversion_jax.training.trained_concept import to_concept
from catversion_jax.training.training_prompts import check_prompts
from catversion_jax.utils.errors import Interrupted, UserError
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import remove_folder


@dataclass(frozen=True)
class Outcome:
    """The result of training."""

    concept: Concept
    photos: list[Photo]
    interrupted_by: signal.Signals | None  # the signal that ended it early, before the concept's file was written


@dataclass(frozen=True)
class Watch:
    """What is told of a training while it runs."""

    photos: Callable[[list[Photo]], object] = lambda _: None  # as soon as they are read
    trackers: Sequence[Tracker] = ()


def load_model(config: Config, concepts: int = 1) -> BasePipeline:
    """Loads the config's base model onto the devices of a training step of `concepts` concepts."""
    return load_pipeline(config.model, config.make_mesh(concepts), config.mesh.rules)


def train(
    config: Config, run: RunDir, pipeline: BasePipeline, watch: Watch = Watch(), given: list[Photo] | None = None
) -> Outcome:
    """Runs, or resumes, the training that `config` describes, and writes `concept.safetensors`.

    `given` are photos that take the place of those in `data.dir`. Raises UserError for a user's mistake, before
    anything is compiled.
    """
    photos = photos_of(run, config, pipeline.networks.resolution, given)
    watch.photos(photos)
    step_config = StepConfig.of(config, pipeline.networks)
    sampler = config.sample.sampler
    # Called only for its UserError, which would otherwise come after the training.
    schedulers.plan(pipeline.networks.schedule, sampler.scheduler, sampler.steps)
    check_masks(photos, config.train.background_weight)
    check_prompts(config, step_config.method, pipeline, photos)
    warn_of_idle_devices(config, step_config.mesh)
    todo = f"lower train.batch_size ({config.train.batch_size}), or set train.remat=True or a narrower model.dtype"
    with run.held(config) as check, enough_memory(todo):
        store(run, photos)
        data = prepare(config, step_config.method, pipeline, photos, kept=run.class_latents)
        checkpoints = open_checkpoints(run.checkpoints, config.checkpoint.keep, check)
        try:
            outputs = Outputs(run, checkpoints, watch.trackers, check)
            state, interrupted_by = loop(config, step_config, pipeline, data, outputs)
        finally:
            checkpoints.close()
        concept = to_concept(config, step_config.method, pipeline.fingerprint, state)
        if interrupted_by is None:
            check()
            with explained(f"{run.artifact}: could not write the concept"):
                concept_file.save(run.artifact, concept)
    return Outcome(concept, photos, interrupted_by)


def train_once(config: Config, pipeline: BasePipeline) -> Concept:
    """Returns the concept of config.run_dir, trained unless it exists. Raises Interrupted after a signal."""
    run = RunDir.of(config)
    run.check(config, resume=True)
    if run.artifact.is_file():
        return concept_file.load(run.artifact)
    outcome = train(config, run, pipeline)
    if outcome.interrupted_by:
        raise Interrupted(outcome.interrupted_by)
    return outcome.concept


def photos_of(run: RunDir, config: Config, resolution: int, given: list[Photo] | None = None) -> list[Photo]:
    """Returns the photos. A run that took a step goes on with those that it stored: the originals may have changed.

    Raises UserError if these are damaged or missing, as others would make another concept.
    """
    if run.has_saved_steps:
        return dataset.read_dataset(run.data)
    if given is not None:
        return given
    if not count_photos(config.data).photos and run.config.is_file() and run.belongs_to(config):
        with contextlib.suppress(UserError):  # which would say less than the one that follows
            stored = dataset.read_dataset(run.data)
            warn(f"{config.data.dir}: no photos any more; those that were stored in {run.data} are used")
            return stored
    return training_photos(config.data, resolution)


def store(run: RunDir, photos: list[Photo]) -> None:
    """Stores the photos, unless the run has them; what is left of others, with which no step was taken, is replaced."""
    if not run.has_saved_steps and run.data.is_dir() and not is_stored(run, photos):
        warn(f"{run.data}: damaged, or not the photos of now; as no step was taken, they are stored anew")
        remove_folder(run.data)
    with explained(f"{run.data}: could not store the photos"):
        dataset.write_dataset(run.data, photos)


def is_stored(run: RunDir, photos: list[Photo]) -> bool:
    """Returns whether the run's folder holds these photos, undamaged."""
    try:
        return dataset.are_equal(dataset.read_dataset(run.data), photos)
    except UserError:
        return False
