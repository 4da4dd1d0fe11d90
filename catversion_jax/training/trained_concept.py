"""Converts the training state to the concept that is saved."""

import jax
import numpy as np

from catversion_jax.config import Config
from catversion_jax.methods.base import Method
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.state import TrainState


def to_concept(config: Config, method: Method, fingerprint: str, state: TrainState) -> Concept:
    """Returns the concept of a state with one concept, [1, ...]; `fingerprint` is that of the base model."""
    model = config.model
    return Concept(
        learned=jax.tree.map(lambda x: np.asarray(x[0]), state.result(config.stop)),
        method=method,
        class_word=config.concept.class_word,
        templates=tuple(config.concept.templates),
        fingerprint=fingerprint,
        model_path=model.path,
        model_revision=model.revision,
        model_variant=model.variant,
        model_prediction_type=model.prediction_type,
        steps=int(state.step[0]),
        learning_rate=config.train.learning_rate,
        seed=config.seed,
        strength=config.sample.strength,
        sampler=config.sample.sampler,
    )
