"""Weights & Biases and trackio, as they are installed: both keep what they are told on this machine."""

import importlib.util
import json
import os
import re
import sqlite3
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from catversion_jax.config import Config
from catversion_jax.data import concept_sets
from catversion_jax.training import trackers
from catversion_jax.training.metric_writer import MetricRow
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.trackers import TrackedRun, shared_config, tracked
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of

BLOCK, HEADER, PART, WHOLE, LAST = 1 << 15, 7, struct.Struct("<IHB"), 1, 4
# Read when trackio is imported; each test has a project, which is a file of its own.
TRACKIO = Path(os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-")))
TEAPOT = concept_sets.SHIPPED / "teapot" / "train"


@pytest.fixture(autouse=True)
def on_this_machine(tmp_path, monkeypatch):
    values = {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true", "TRACKIO_PROJECT": tmp_path.name}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    yield
    wandb.teardown()  # which reads the environment once in a process


def wandb_records(folder) -> list[wandb_internal_pb2.Record]:
    """What the one run in a folder would be sent with `wandb sync`."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole, records = path.read_bytes(), HEADER, b"", []
    # LevelDB's log: blocks of 32 KiB of parts, each with a checksum, its length and whether it ends a record.
    while at + PART.size <= len(data):
        if BLOCK - at % BLOCK < PART.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = PART.unpack_from(data, at)
        at += PART.size
        whole += data[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def wandb_history(folder) -> list[dict]:
    rows = [record.history.item for record in wandb_records(folder) if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def database_of(folder) -> Path:
    (path,) = TRACKIO.glob(f"{folder.name}*.db")
    return path


def trackio_history(folder) -> dict[int, dict]:
    rows: dict[int, dict] = {}
    with sqlite3.connect(database_of(folder)) as database:
        for step, metrics in database.execute("select step, metrics from metrics"):
            rows.setdefault(step, {}).update(json.loads(metrics))
    return rows


def images_of(row: dict) -> set[str]:
    """What is no number; Weights & Biases has a value for each part of an image."""
    return {key.split(".")[0] for key in row}


def test_a_run_of_both(tiny_model, tmp_path):
    """They have what metrics.jsonl has, the images, and no folder of the machine."""
    run = tmp_path / "mug"
    settings = {
        "model.path": tiny_model, "run_dir": run, "data.dir": TEAPOT, "concept.class_word": "teapot",
        "train.steps": 4, "train.batch_size": 2, "sample.every": 2, "sample.steps": 2, "stop.every": 2,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    catversion("train", "--config=mini", *flags, "--track=wandb", "--track=trackio", "--track=wandb", here=True)
    told = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        told.setdefault(line.pop("step"), {}).update(line)
    assert sorted(told) == [1, 2, 3, 4]

    for history in (trackio_history(tmp_path), {row["_step"]: row for row in wandb_history(tmp_path)}):
        for step, row in told.items():
            assert {key: history[step][key] for key in row} == pytest.approx(row)
        assert "validation" in images_of(history[2])
        assert images_of(history[4]) >= {"validation", "samples"}
    (record,) = [record for record in wandb_records(tmp_path) if record.HasField("run")]
    config = {update.key: json.loads(update.value_json) for update in record.run.config.update}
    assert re.fullmatch("mug-[0-9a-f]{4}", record.run.display_name)
    assert record.run.project == "catversion"
    assert (config["train.steps"], config["model.path"], config["data.dir"]) == (4, tiny_model.name, "")
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    for content in (path.read_bytes(), database_of(tmp_path).read_bytes()):
        assert str(tmp_path).encode() not in content
        assert str(TEAPOT).encode() not in content


def test_an_interrupted_run_goes_on_as_the_same(tmp_path):
    ids = []
    for steps in ((1, 2), (3,)):
        with tracked(["wandb", "trackio"], Config(), RunDir(tmp_path / "mug")) as (wandb_run, trackio_run):
            for step in steps:
                for run in (wandb_run, trackio_run):
                    run.row(MetricRow(step, loss=0.5))
        ids += [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
        if len(steps) == 2:
            (tmp_path / "wandb").rename(tmp_path / "before")
    assert ids[0] == ids[1]
    assert sorted(trackio_history(tmp_path)) == [1, 2, 3]
    with sqlite3.connect(database_of(tmp_path)) as database:
        ((name,),) = database.execute("select distinct run_name from metrics").fetchall()
    assert name == f"mug-{(tmp_path / 'mug' / '.tracked').read_text()[:4]}"
    with tracked(["trackio"], Config(), RunDir(tmp_path / "other" / "mug")) as (run,):
        run.row(MetricRow(1, loss=0.5))
    with sqlite3.connect(database_of(tmp_path)) as database:
        assert len(database.execute("select distinct run_name from metrics").fetchall()) == 2


def test_mistakes(tmp_path, monkeypatch):
    given = ["train", "--config=mini", "--config.concept.class_word=teapot", f"--config.data.dir={TEAPOT}"]
    given.append(f"--config.run_dir={tmp_path / 'run'}")
    assert "should be one of <wandb|trackio>" in error_of(*given, "--track=mlflow")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "--track=wandb: not begun (" in error_of(*given, "--track=wandb")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert error_of(*given, "--track=wandb").endswith("--track=wandb: wandb is not installed; pip install wandb")
    assert not (tmp_path / "run").exists()


def test_one_that_fails_does_not_end_the_training(monkeypatch, caplog):
    run = TrackedRun("trackio", Config(), "mug", "0" * 16)
    monkeypatch.setattr(run._package, "log", lambda *_, **__: 1 / 0)
    for step in (1, 2):
        run.row(MetricRow(step, loss=0.5))
    run.image(2, "validation", np.zeros((8, 8, 3), np.uint8))
    assert caplog.messages == [
        "--track=trackio: told nothing from here on (division by zero); metrics.jsonl has everything"
    ]
    monkeypatch.undo()
    run._package.finish()


def test_what_is_shared(tmp_path):
    (tmp_path / "model").mkdir()
    config = Config().replaced({"model.path": str(tmp_path / "model"), "data.dir": "/home/me/mugs", "run_dir": "/r"})
    shared = shared_config(config)
    assert shared["model.path"] == "model"
    assert not [key for key, value in shared.items() if isinstance(value, str) and value.startswith("/")]
    with pytest.raises(UserError, match="not installed"):
        TrackedRun("no_such_package", config, "mug", "0" * 16)
    assert set(trackers.TRACKERS) == {"wandb", "trackio"}
