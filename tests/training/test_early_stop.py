"""Early stopping keeps what was learned at the lowest loss, not what came after it."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.config.sections import StopConfig
from catversion_jax.training.checkpoints import LocalCheckpoints, read_newest
from catversion_jax.training.step import noted
from tests.training.test_checkpoints import NOTE, assert_same, state

STOP = StopConfig(every=2, patience=2)


def at(step: int, before=None):
    """Two concepts whose learned numbers are those of the step, with what was noted before."""
    new = state(step)
    kept = {"prefix": np.zeros_like(new.learned["prefix"])}
    if before is None:
        return new.replace(best=np.full(2, np.inf, np.float32), kept=kept)
    return new.replace(best=before.best, stale=before.stale, kept=before.kept)


def evaluated(losses: list[list[float]], due=(True, True)):
    """The state after these evaluations of two concepts, at steps 2, 4, 6 and so on."""
    found = None
    for i, pair in enumerate(losses):
        found = noted(at(2 * i + 2, found), jnp.asarray(pair, jnp.float32), jnp.asarray(due), 0.0)
    return found


def test_the_best_is_kept():
    found = evaluated([[0.5, 0.5], [0.3, 0.6], [0.4, 0.7]])
    np.testing.assert_allclose(found.best, [0.3, 0.5])
    assert found.stale.tolist() == [1, 2]
    np.testing.assert_array_equal(found.kept["prefix"], [state(4).learned["prefix"][0], state(2).learned["prefix"][1]])


def test_a_concept_that_is_not_due_keeps_what_it_has():
    found = evaluated([[0.5, 0.5]], due=(True, False))
    assert found.best.tolist() == [0.5, np.inf]
    assert not found.kept["prefix"][1].any()


@pytest.mark.parametrize(
    ("stop", "losses", "step"),
    [
        (STOP, [0.3, 0.5, 0.4], 2),  # stopped early: the state at the lowest loss
        (STOP, [0.5, 0.3, 0.4], 6),  # its last step came first
        (StopConfig(), [0.3, 0.5, 0.4], 6),  # without early stopping
        (STOP, [np.nan, np.nan, np.nan], 6),  # no evaluation was good
    ],
)
def test_the_result(stop, losses, step):
    found = evaluated([[loss, loss] for loss in losses])
    one = replace(found, best=found.best[:1], stale=found.stale[:1])
    np.testing.assert_array_equal(one.result(stop)["prefix"], state(step).learned["prefix"])


def test_a_checkpoint_of_a_version_that_kept_no_best(tmp_path):
    """It goes on; its best so far counts as the one that it has."""
    like = at(0)
    checkpoints = LocalCheckpoints(tmp_path, keep=1)
    checkpoints.save(4, state(4), NOTE)
    checkpoints.close()
    path = Path(tmp_path / "4" / "config" / "metadata")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}))
    found = read_newest(tmp_path, lambda _: like).state
    assert_same(found, state(4).replace(kept=state(4).learned))
