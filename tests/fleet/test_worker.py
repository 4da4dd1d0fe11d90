"""A worker without Ray: it goes on from what one before it had saved, and hands back what it has not begun."""

import time
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.config import Config
from catversion_jax.fleet import run_home
from catversion_jax.fleet import worker as module
from catversion_jax.fleet.home import Handed
from catversion_jax.fleet.run_home import RunHome
from catversion_jax.fleet.worker import ConceptWorker, Setup, with_whole_paths
from catversion_jax.methods import concept_file
from catversion_jax.training.engine import ConceptJob
from catversion_jax.training.interrupted import noted_ids
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.share import Share
from catversion_jax.training.status import ConceptStatus
from catversion_jax.utils.errors import StorageError
from catversion_jax.utils.log import LOGGER
from tests.training.test_many_concepts import LINES, config_of, prefixes, run, write

STEPS = 40


@pytest.fixture
def share(tiny_model, tmp_path) -> Share:
    lines = [{**line, "steps": STEPS} for line in LINES]
    config = config_of(tiny_model, tmp_path / "out", **{"batch.previews": 0, "checkpoint.every": 5, "batch.slots": 2})
    share = Share.of(config, write(tmp_path / "list.jsonl", lines))
    with RunDir.of(config).held(share.config):
        pass
    return share


@pytest.fixture
def started(share, monkeypatch):
    """Starts workers, whose turns are as short as can be."""
    monkeypatch.setattr(module, "TURN", 0.0)
    before = LOGGER.handlers[:], LOGGER.propagate

    def start(name: str) -> ConceptWorker:
        home = RunHome(RunDir.of(share.config).config.read_text())
        worker = ConceptWorker(f"{name}-of-ray", name, {}, Setup(share.config, share.room, home))
        assert worker.start().error is None
        return worker

    yield start
    LOGGER.handlers[:], LOGGER.propagate = before


def handed(share: Share, *saved_by: str) -> list[Handed]:
    return [
        Handed(
            ConceptJob(line.id, line.digest, share.config_of(line)), 1.5, tuple(f"{name}-of-ray" for name in saved_by)
        )
        for line in share.lines()
    ]


def steps_of(worker: ConceptWorker) -> dict[str, int]:
    """The steps of the concepts in a worker's slots."""
    engine = worker.engine
    return {entered.job.id: int(engine.slots.host.step[index]) for index, entered in engine.entered.items()}


def finish(worker: ConceptWorker) -> dict[str, ConceptStatus]:
    """Lets a worker learn to the end; returns what it says of each concept."""
    found, until = {}, time.monotonic() + 120
    while len(found) < len(LINES):
        report = worker.turn([], 0)
        assert report.error is None
        found |= {ended.status.id: ended.status for ended in report.turn.ended}
        assert time.monotonic() < until
    return found


def test_paths_mean_the_same_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    paths = {"": "", "model": f"{tmp_path}/model", "runwayml/stable": "runwayml/stable"}
    for path, expected in paths.items():
        config = with_whole_paths(Config().replaced({"model.path": path, "run_dir": "out"}))
        assert (config.model.path, config.run_dir) == (expected, f"{tmp_path}/out")
    assert with_whole_paths(Config()).run_dir == ""


def test_one_that_leaves_loses_nothing(share, started, tmp_path, tiny_model):
    first, concepts = started("x"), handed(share)
    report = first.turn(concepts, 0)
    for _ in range(12):
        report = first.turn([], 0)
    steps = steps_of(first)
    assert set(report.begun) == {"a", "b"}
    assert min(steps.values()) >= 10
    first.leave()
    assert noted_ids(RunDir.of(share.config).checkpoints / "x-of-ray") == ["a", "b"]
    second = started("y")
    second.turn(handed(share, "w", "x"), 0)
    resumed = steps_of(second)
    while resumed.keys() != steps.keys():
        second.turn([], 0)
        resumed = steps_of(second) | resumed
    assert resumed == {concept_id: step + 1 for concept_id, step in steps.items()}
    statuses = finish(second)
    assert {status.node for status in statuses.values()} == {"y"}
    assert all(status.waited >= 1.5 for status in statuses.values())
    assert (
        run(config_of(tiny_model, tmp_path / "whole", **{"batch.slots": 2, "batch.previews": 0}), share.manifest) == 0
    )
    for concept_id, prefix in prefixes(tmp_path / "whole").items():
        found = concept_file.load(Path(share.config.run_dir) / concept_id).learned["prefix"]
        np.testing.assert_array_equal(found, prefix, err_msg=concept_id)


def test_a_concept_of_another_digest_begins_anew(share, started):
    first = started("x")
    first.turn(handed(share)[:1], 0)
    for _ in range(7):
        first.turn([], 0)
    first.leave()
    second = started("y")
    (one,) = handed(share, "x")[:1]
    second.turn([one._replace(job=ConceptJob(one.job.id, "another", one.job.config))], 0)
    assert int(second.engine.slots.host.step[0]) == 1


def test_what_is_not_begun_is_handed_back(share, started):
    worker = started("x")
    report = worker.turn(handed(share), 0)
    while len(report.begun) < 2:
        report = worker.turn([], 0)
    assert worker.turn([], 5).returned == ("d", "c")
    assert [preparing.handed.job.id for preparing in worker.preparation.jobs] == []


def test_storage_that_fails_is_no_concepts_fault(share, started, monkeypatch):
    worker = started("x")

    def fails(*_):
        raise StorageError("checkpoints: cannot be read now")

    monkeypatch.setattr(run_home, "read_interrupted", fails)
    report = worker.turn(handed(share, "gone")[:1], 0)
    assert isinstance(report.error, StorageError)
    assert str(report.error) == "x: checkpoints: cannot be read now"
    assert not list(Path(share.config.run_dir).glob("*/status.json"))
