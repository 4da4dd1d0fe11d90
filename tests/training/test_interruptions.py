"""What a batch and a run say and do when they are interrupted, and go on with other lines or fewer devices."""

import os
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from catversion_jax.cli import main
from catversion_jax.config import Config
from catversion_jax.data.manifest import Line
from catversion_jax.models.sharding import make_mesh
from catversion_jax.training import step
from catversion_jax.training.engine import ConceptJob, Engine, told_of_failure
from catversion_jax.training.interrupted import InterruptedConcept
from catversion_jax.training.loop import enough_memory, not_finite, signals
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.share import Share, refuse_changed_lines
from catversion_jax.training.status import DONE, ConceptStatus, write_status
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.id_set import IdSet
from tests.training.test_checkpoints import state
from tests.training.test_many_concepts import LINES, write


@pytest.fixture
def heeds_ctrl_c():
    """Python's own handler: a process that a shell started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_is_answered_at_once(caplog):
    """Once says that the step is finished first, and how to stop at once; twice stops."""
    with signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        until = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
        assert received == [signal.SIGINT]
        (message,) = caplog.messages
        assert (
            message
            == "stopping after this step, whose state is then saved; a second Ctrl-C stops at once, without saving"
        )
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.\nmore"),
        MemoryError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes."),
    ],
)
def test_out_of_memory(error):
    with pytest.raises(UserError) as found, enough_memory("lower batch.slots (8)"):
        raise error
    words = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes."
    assert str(found.value) == f"out of memory ({words}); lower batch.slots (8)"
    with pytest.raises(RuntimeError, match="other"), enough_memory("x"):
        raise RuntimeError("other")


def test_advice_for_a_loss_that_is_not_finite():
    """Before the first step nothing was learned: the learning rate had no part in it."""
    assert "learning_rate" not in not_finite(0, Config())
    assert not_finite(0, Config()).endswith("check the photos, the base model's weights and model.dtype (float32)")
    assert "after step 7; lower train.learning_rate (" in not_finite(7, Config())


@pytest.mark.parametrize(
    ("devices", "slots", "batch_size", "expected"),
    [
        (6, 8, 1, "batch.slots=8 with train.batch_size=1 divides over 2 of the 6 devices, and 4 are idle; make "
         "batch.slots a multiple of 6"),
        (6, 6, 1, None),
        (8, 2, 4, None),  # each concept's batch is split too
        (8, None, 2, "train.batch_size=2 divides over 2 of the 8 devices, and 6 are idle; make it a multiple of 8, or "
         "train several concepts at once with catversion batch"),
        (2, None, 2, None),
        (1, None, 1, None),
    ],
)  # fmt: skip
def test_idle_devices(monkeypatch, caplog, devices, slots, batch_size, expected):
    config = Config().replaced({"train.batch_size": batch_size})
    monkeypatch.setattr(step.jax, "local_device_count", lambda: devices)
    mesh = make_mesh(slots or 1, batch_size, devices=[jax.devices()[0]] * devices)
    step.warn_of_idle_devices(config, mesh, slots)
    assert caplog.messages == ([expected] if expected else [])


@pytest.fixture
def share(tmp_path) -> Share:
    config = Config().replaced({"run_dir": str(tmp_path / "out")})
    (tmp_path / "out" / "a").mkdir(parents=True)
    return Share.of(config, write(tmp_path / "list.jsonl", LINES))


def line(**changes) -> Line:
    return Line(**{**LINES[0], **changes})


@pytest.mark.parametrize("changes", [{"class_word": "pot"}, {"dir": "dog/train"}, {"seed": 3}, {"steps": 5}])
def test_a_changed_line_is_not_done_already(share, changes):
    """Its concept was learned with other values."""
    run = RunDir.of(share.config)
    write_status(run.path / "a", ConceptStatus("a", DONE, steps=3, digest=line(**changes).digest))
    refuse_changed_lines(share, run, IdSet(), IdSet("a"))  # a status without the concept's file is worth nothing
    with pytest.raises(UserError) as error:
        refuse_changed_lines(share, run, IdSet("a"), IdSet("a"))
    assert str(error.value) == (
        f"{share.manifest}: concepts that are done already have other values here (a); give the old values or another "
        f"id, or remove {run.path}/ID to learn it anew"
    )


@pytest.mark.parametrize(
    "changes",
    [None, {}, {"id": "b", "masks": "", "article": ""}, {"seed": 0}, {"steps": 1000}, {"dir": "./teapot/train/"}],
)
def test_a_line_that_is_done(share, changes):
    """With the same values in any spelling, or by a status of an older version, which has no digest."""
    run, config = RunDir.of(share.config), share.config
    folder = share.manifest.parent
    digest = None if changes is None else line(**changes).resolved(folder, config.seed, config.train.steps).digest
    write_status(run.path / "a", ConceptStatus("a", DONE, steps=3, digest=digest))
    refuse_changed_lines(share, run, IdSet("a"), IdSet("a"))


@pytest.mark.parametrize(
    ("digest", "seed", "continues"),
    [(line().digest, 0, True), (None, 0, True), (line(dir="dog/train").digest, 0, False), (line().digest, 1, False)],
)
def test_an_interrupted_line_that_changed(caplog, digest, seed, continues):
    """It begins anew: its state was learned from other photos."""
    saved = state(4, 1).replace(seed=np.asarray([seed], np.uint32))
    engine = SimpleNamespace(
        saved={"a": InterruptedConcept(saved, digest)}, step_config=SimpleNamespace(init_state=lambda seeds: "new")
    )
    job = ConceptJob("a", line().digest, Config())
    found = Engine.state_of(engine, job)
    assert (found is saved) == continues
    assert ("a: it has other values than when it was interrupted; begun anew" in caplog.messages) != continues
    assert Engine.state_of(engine, job) == "new"  # it is taken once


def test_memory_that_is_full_is_no_concepts_fault():
    """While others train, the next one is encoded: it is not reported as failed, but the batch says what to lower."""
    failed: list[str] = []
    with (
        pytest.raises(UserError, match=r"out of memory .*; lower batch\.slots"),
        enough_memory("lower batch.slots"),
        told_of_failure(failed.append),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert not failed


@pytest.mark.parametrize(("command", "advice"), [("train", " again with --resume"), ("batch", " again")])
def test_the_advice_is_that_of_the_command(command, advice):
    """batch has no --resume: the same command goes on."""
    words, status = main.explain(OSError(28, os.strerror(28), "out"), command)
    assert (words, status) == (f"out: No space left on device; fix that and run the command{advice}", 74)
