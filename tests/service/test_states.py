"""What a service saves of the concepts in training, and who trains them, without a server."""

from collections import deque
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from catversion_jax.config import Config
from catversion_jax.fleet.home import Report
from catversion_jax.service.fleet_trainer import FleetTrainer
from catversion_jax.service.states import States
from catversion_jax.service.trainer import TrainingEndedError
from catversion_jax.service.worker import Worker
from catversion_jax.training import checkpoints
from catversion_jax.training.checkpoints import Saved, saved_steps
from catversion_jax.training.concept_data import Room
from catversion_jax.training.engine import Ended
from catversion_jax.training.interrupted import InterruptedConcept, note_of
from catversion_jax.training.status import DONE, ConceptStatus
from catversion_jax.training.step import StepConfig
from catversion_jax.training.turn import Turn
from catversion_jax.utils.errors import StorageError


@pytest.fixture(scope="module")
def step(tiny_pipeline) -> StepConfig:
    return StepConfig.of(Config(), tiny_pipeline.networks)


def states_of(step: StepConfig, ids: str) -> dict[str, InterruptedConcept]:
    return {name: InterruptedConcept(jax.device_get(step.init_state([ord(name)])), f"digest of {name}") for name in ids}


def test_those_that_are_wanted_come_back(step, tmp_path):
    states = States(tmp_path / "states", 2)
    given = states_of(step, "abc")
    states.save(given)
    states.close()
    found = States(tmp_path / "states", 2).read(step, "ac")
    assert found.keys() == {"a", "c"}
    assert found["c"].digest == "digest of c"
    np.testing.assert_array_equal(found["c"].state.seed, given["c"].state.seed)
    jax.tree.map(np.testing.assert_array_equal, found["a"].state, given["a"].state)


def test_what_is_replaced_is_gone(step, tmp_path):
    folder = tmp_path / "states"
    states = States(folder, 2)
    states.save(states_of(step, "abc"))
    states.replace(states_of(step, "b"))
    assert saved_steps(folder) == [2]
    assert States(folder, 2).read(step, "abc").keys() == {"b"}
    states.replace({})
    assert not folder.exists()
    states.save(states_of(step, "d"))
    states.close()
    assert States(folder, 2).read(step, "abcd").keys() == {"d"}


def test_it_is_gone_where_there_is_no_room_for_the_others(step, tmp_path, monkeypatch):
    folder = tmp_path / "states"
    states = States(folder, 2)
    states.save(states_of(step, "abc"))
    states.close()
    monkeypatch.setattr(checkpoints.LocalCheckpoints, "save", fails)
    states.replace(states_of(step, "b"))
    assert not folder.exists()


def fails(*_):
    raise StorageError("no room")


def test_an_earlier_failure_is_not_the_next_saves(step, tmp_path, monkeypatch):
    """A save in the background had failed: the next one opens the folder anew."""
    states = States(tmp_path / "states", 2)
    states.save(states_of(step, "a"))
    with monkeypatch.context() as patch:
        patch.setattr(states._open, "save", fails)
        states.save(states_of(step, "ab"))
    states.close()
    assert States(tmp_path / "states", 2).read(step, "ab").keys() == {"a", "b"}


class NoThread:
    """A fleet that does nothing."""

    def __init__(self) -> None:
        self.reports: deque[Report] = deque()
        self.failure: Exception | None = None
        self.learning = 1
        self.cancelled: list[str] = []

    def begin(self, *_) -> None:
        pass

    def enter(self, *_) -> None:
        pass

    def cancel(self, ids) -> None:
        self.cancelled += ids


def report_of(step: StepConfig, ids: str, ended: str = "") -> Report:
    given = states_of(step, ids)
    whole = jax.tree.map(lambda *each: np.concatenate(each), *(one.state for one in given.values()))
    saved = Saved(1, whole, note_of([(name, one.digest) for name, one in given.items()]))
    return Report(Turn(tuple(Ended(ConceptStatus(name, DONE), None) for name in ended)), saved=saved)


@pytest.fixture
def trainer(step, tmp_path) -> FleetTrainer:
    made = FleetTrainer(NoThread(), Config(), Room(), States(tmp_path / "states", 2), {})
    for name in "ab":
        made.enter(SimpleNamespace(id=name), None)
    return made


def test_a_fleets_states_are_saved(step, trainer, tmp_path):
    assert not trainer.is_busy
    trainer.thread.reports.append(report_of(step, "abx", ended="b"))
    assert trainer.is_busy
    trainer.train()
    assert trainer.is_busy  # a save is due
    trainer.save_if_due()
    assert not trainer.is_busy
    trainer.states.close()
    # Neither the one that has ended, nor one that was removed meanwhile.
    assert trainer.states.read(step, "abx").keys() == {"a"}
    trainer.remove(["a"])
    assert trainer.thread.cancelled == ["a"]
    assert not (tmp_path / "states").exists()


def test_a_fleet_that_has_ended_ends_the_server_after_its_last_report(step, trainer):
    """Even where the reason looks like something that passes."""
    trainer.thread.failure = StorageError("a: the bucket is not reached")
    trainer.thread.reports.append(report_of(step, "a"))
    assert trainer.is_busy
    trainer.train()
    with pytest.raises(TrainingEndedError) as raised:
        trainer.train()
    learning = SimpleNamespace(trainer=trainer, settle=lambda: [], admit=lambda: None, train=trainer.train)
    store = SimpleNamespace(with_status=lambda *_: [])
    drawings = SimpleNamespace(waiting=lambda: False)
    with pytest.raises(TrainingEndedError):
        Worker(store, drawings, lambda: learning, 0.5).turn(learning)
    assert raised.value.__cause__ is trainer.thread.failure
