"""From the state of training to the concept that its file holds."""

import jax
import numpy as np

from catversion_jax.config import Config
from catversion_jax.methods.base import Method
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.state import TrainState


def to_concept(config: Config, method: Method, fingerprint: str, state: TrainState) -> Concept:
    """The concept of a state with one concept, [1, ...]; `fingerprint` is the base model's."""
    model = config.model
    return Concept(
        learned=jax.tree.map(lambda x: np.asarray(x[0]), state.learned),
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
        sampler=config.sample.sampler,
    )
