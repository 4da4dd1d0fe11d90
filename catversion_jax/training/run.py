"""A run: trains one concept on a folder of photos, in a run folder from which an interrupted run resumes."""

import contextlib
import signal
from dataclasses import dataclass

from catversion_jax.base import schedulers
from catversion_jax.base.pipeline import Pipeline, load_pipeline
from catversion_jax.config import Config
from catversion_jax.data import dataset
from catversion_jax.data.photos import Photo, read_photos
from catversion_jax.methods import concept_file
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.checkpoints import Checkpoints, explained
from catversion_jax.training.concept_data import check_masks, prepare
from catversion_jax.training.loop import loop
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.step import StepConfig
from catversion_jax.training.trained_concept import to_concept
from catversion_jax.utils.errors import Interrupted, UserError


@dataclass(frozen=True)
class Outcome:
    """The result of training."""

    concept: Concept
    photos: list[Photo]
    interrupted_by: signal.Signals | None  # the signal that ended it early, before the concept's file was written


def load_model(config: Config, concepts: int = 1) -> Pipeline:
    """Loads the config's base model onto the devices of a training step of `concepts` concepts."""
    return load_pipeline(config.model, config.make_mesh(concepts), config.mesh.rules)


def train(config: Config, run: RunDir, pipeline: Pipeline) -> Outcome:
    """Runs, or resumes, the training that `config` describes, and writes `concept.safetensors`.

    Raises UserError for a user's mistake, before anything is compiled.
    """
    photos = stored_or_read(run, config, pipeline.networks.resolution)
    step_config = StepConfig.of(config, pipeline.networks)
    sampler = config.sample.sampler
    # Called only for its UserError, which would otherwise come after the training.
    schedulers.plan(pipeline.networks.schedule, sampler.scheduler, sampler.steps)
    check_masks(photos, config.train.background_weight)
    run.claim(config)
    with explained(f"{run.data}: could not store the photos"):
        dataset.write_dataset(run.data, photos)
    data = prepare(config, step_config.method, pipeline, photos, kept=run.class_latents)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep)
    try:
        state, interrupted_by = loop(config, step_config, pipeline, data, run, checkpoints)
    finally:
        checkpoints.close()
    concept = to_concept(config, step_config.method, pipeline.fingerprint, state)
    if interrupted_by is None:
        with explained(f"{run.artifact}: could not write the concept"):
            concept_file.save(run.artifact, concept)
    return Outcome(concept, photos, interrupted_by)


def train_once(config: Config, pipeline: Pipeline) -> Concept:
    """Returns the concept of config.run_dir, trained unless it exists. Raises Interrupted after a signal."""
    run = RunDir.of(config)
    run.check(config, resume=True)
    if run.artifact.is_file():
        return concept_file.load(run.artifact)
    outcome = train(config, run, pipeline)
    if outcome.interrupted_by:
        raise Interrupted(outcome.interrupted_by)
    return outcome.concept


def stored_or_read(run: RunDir, config: Config, resolution: int) -> list[Photo]:
    """Returns the photos. A resumed run reads those it stored, since the folder may have changed or gone."""
    if run.config.is_file() and run.data.is_dir():
        with contextlib.suppress(UserError):
            return dataset.read_dataset(run.data)
    return read_photos(config.data.dir, resolution, config.data.masks_dir)
