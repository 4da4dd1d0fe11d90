"""Many concepts in one compiled step: each as in a run of its own, whatever happens to the others."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.cli import batch
from catversion_jax.config import Config
from catversion_jax.data import manifest
from catversion_jax.methods import concept_file
from catversion_jax.training import engine
from catversion_jax.training import step as ts
from catversion_jax.training.distributed import Process
from catversion_jax.training.many_concepts import train_many
from catversion_jax.training.preparation import Preparation
from catversion_jax.training.run import load_model, train
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.share import Share
from catversion_jax.utils.errors import UserError
from tests.commands import ENVIRONMENT, ROOT, catversion, command, error_of

CONCEPTS = ROOT / "catversion_jax" / "concepts"
LINES = [
    {"id": "a", "dir": "teapot/train", "class_word": "teapot"},
    {"id": "b", "dir": "dog/train", "class_word": "dog", "seed": 5, "masks": "dog/train_masks"},
    {"id": "c", "dir": "owl/train", "class_word": "owl", "steps": 9},
    {"id": "d", "dir": "rocket/train", "class_word": "rocket", "steps": 4, "seed": 7, "article": "the"},
]
STEPS = 6


def config_of(tiny_model: Path, run_dir: Path, **changes) -> Config:
    return Config().replaced({
        "model.path": str(tiny_model), "run_dir": str(run_dir), "adapter.length": 2, "adapter.init_std": 0.1,
        "train.steps": STEPS, "train.batch_size": 2, "train.decay": "cosine", "checkpoint.every": 2, "batch.slots": 3,
        **changes,
    })  # fmt: skip


def run(config: Config, path: Path) -> int:
    """Train the manifest at `path`; the exit status."""
    return batch.report(train_many(Share.of(config, path)))


def write(path: Path, lines: list[dict]) -> Path:
    """A manifest beside a link to the shipped concepts, which its relative folders begin at."""
    for concept in CONCEPTS.iterdir():
        link = path.parent / concept.name
        if concept.is_dir() and not link.exists():
            link.symlink_to(concept)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def report(run_dir: Path) -> dict[str, dict]:
    """What became of each concept, by id."""
    entries = {path.parent.name: json.loads(path.read_text()) for path in run_dir.glob("*/status.json")}
    assert {id: entry["id"] for id, entry in entries.items()} == {id: id for id in entries}
    return entries


def prefixes(run_dir: Path, ids="abcd") -> dict[str, np.ndarray]:
    return {id: concept_file.load(run_dir / id).learned["prefix"] for id in ids}


def assert_close(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for id, prefix in theirs.items():
        np.testing.assert_allclose(
            ours[id], prefix, atol=1e-4, err_msg=id
        )  # AdamW amplifies small gradients' last bits


@pytest.fixture(scope="module")
def solo(tiny_model, tiny_pipeline, tmp_path_factory):
    """What each line learns in a run of its own."""

    def learn_each(**changes) -> dict[str, np.ndarray]:
        learned = {}
        for line in LINES:
            of_line = {"data.dir": str(CONCEPTS / line["dir"]), "concept.class_word": line["class_word"]}
            of_line |= {"concept.article": line.get("article", "")}
            of_line |= {"seed": line.get("seed", 0), "train.steps": line.get("steps", STEPS)}
            config = config_of(tiny_model, tmp_path_factory.mktemp("solo") / line["id"], **changes | of_line)
            learned[line["id"]] = train(config, RunDir.of(config), tiny_pipeline).concept
        return learned

    return learn_each


@pytest.fixture(scope="module")
def alone(solo) -> dict[str, np.ndarray]:
    return {id: concept.learned["prefix"] for id, concept in solo().items()}


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_each_concept_equals_its_solo_run(tiny_model, tmp_path, alone, slots):
    config = config_of(tiny_model, tmp_path / "out", **{"batch.slots": slots})
    assert run(config, write(tmp_path / "list.jsonl", LINES)) == 0
    assert_close(prefixes(tmp_path / "out"), alone)
    entries = report(tmp_path / "out")
    assert {id: (entry["status"], entry["steps"]) for id, entry in entries.items()} == {
        "a": ("done", STEPS), "b": ("done", STEPS), "c": ("done", 9), "d": ("done", 4),
    }  # fmt: skip
    concept = concept_file.load(tmp_path / "out" / "b")
    assert (concept.class_word, concept.seed, concept.steps) == ("dog", 5, STEPS)


def test_one_trace_and_one_executable(tiny_model, tmp_path, monkeypatch):
    shapes = []
    loss = ts.denoising_loss
    monkeypatch.setattr(
        ts, "denoising_loss", lambda learned, *rest: shapes.append(learned["prefix"].shape) or loss(learned, *rest)
    )
    config = config_of(tiny_model, tmp_path / "out", **{"batch.slots": 8, "train.steps": 2, "train.eps": 2e-8})
    lines = [{**LINES[i % 4], "id": str(i), "seed": i, "steps": 2 + i % 3} for i in range(20)]
    assert run(config, write(tmp_path / "list.jsonl", lines)) == 0
    assert {entry["status"] for entry in report(tmp_path / "out").values()} == {"done"}
    assert len(report(tmp_path / "out")) == 20
    ((count, *_),) = shapes  # one trace
    assert count == 8
    step_config = ts.StepConfig.of(config, load_model(config, 8).networks, 8)
    assert ts.compile_chunk(step_config, 1)._cache_size() == 1


def test_bad_concepts_disturb_no_others(tiny_model, tmp_path, alone, monkeypatch):
    prepare = engine.prepare

    def spoiled(config, *rest):
        data = prepare(config, *rest)
        return data.replace(mean=data.mean * np.nan) if config.seed == 13 else data

    monkeypatch.setattr(engine, "prepare", spoiled)
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    bad = [
        {"id": "missing", "dir": "nowhere", "class_word": "teapot"},
        {"id": "corrupt", "dir": "corrupt", "class_word": "teapot"},
        {**LINES[0], "id": "nan", "seed": 13},
        {"id": "nul", "dir": "a\0b", "class_word": "teapot"},
        {"id": "home", "dir": "teapot/train", "masks": "~nosuchuser/x", "class_word": "teapot"},
        {"id": "half", "dir": "teapot/train", "class_word": "tea\ud800pot"},
        {"id": "escape", "dir": "teapot/train", "class_word": "tea\x1b[2Jpot"},
    ]
    order = [bad[0], bad[3], LINES[0], bad[2], bad[4], LINES[1], bad[5], bad[1], LINES[2], bad[6], LINES[3]]
    path = write(tmp_path / "list.jsonl", order)
    config = config_of(tiny_model, tmp_path / "out")
    assert run(config, path) == batch.FAILED
    assert_close(prefixes(tmp_path / "out"), alone)
    entries = report(tmp_path / "out")
    assert {id: entry["error"] for id, entry in entries.items() if entry["status"] == "failed"} == {
        "missing": f"{tmp_path / 'nowhere'}: no such folder; data.dir takes a folder of 1 to 100 photos",
        "corrupt": f"{tmp_path / 'corrupt' / '1.png'}: not a JPEG, PNG, WEBP, HEIC or AVIF image; remove or convert it",
        "nan": "loss or gradient not finite after step 0; check the photos, the base model's weights and model.dtype "
        "(float32)",
        "nul": r"a\x00b: not a path, as it holds a NUL; remove that",
        "home": "~nosuchuser/x: Could not determine home directory; write the folder out",
        "half": "config.concept.class_word='tea\ufffdpot': expected the base class, such as teapot, without braces and "
        "control characters",
        "escape": r"config.concept.class_word='tea\x1b[2Jpot': expected the base class, such as teapot, without braces "
        "and control characters",
    }
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/concept.safetensors")}
    shutil.rmtree(tmp_path / "corrupt")
    (tmp_path / "corrupt").symlink_to(CONCEPTS / "teapot" / "train")
    assert run(config, path) == batch.FAILED  # the others are not learned again
    entries = report(tmp_path / "out")
    assert entries["corrupt"]["status"] == "done"
    assert sorted(id for id, entry in entries.items() if entry["status"] == "failed") == [
        "escape", "half", "home", "missing", "nan", "nul",
    ]  # fmt: skip
    assert done == {path: path.stat().st_mtime_ns for path in done}
    np.testing.assert_allclose(concept_file.load(tmp_path / "out" / "corrupt").learned["prefix"], alone["a"], atol=1e-4)


def test_a_concept_stops_early_as_in_its_solo_run(tiny_model, tmp_path, solo):
    changes = {"stop.every": 2, "stop.patience": 1, "stop.margin": 0.02, "train.decay": "constant"}
    theirs = solo(**changes)
    steps = {id: concept.steps for id, concept in theirs.items()}
    assert min(steps.values()) < STEPS, steps  # else this shows nothing
    config = config_of(tiny_model, tmp_path / "out", **changes, **{"batch.slots": 2})
    assert run(config, write(tmp_path / "list.jsonl", LINES)) == 0
    assert {id: entry["steps"] for id, entry in report(tmp_path / "out").items()} == steps
    assert_close(prefixes(tmp_path / "out"), {id: concept.learned["prefix"] for id, concept in theirs.items()})


def flags(model: Path, run_dir: Path, path: Path, **changes) -> list[str]:
    """The command as config_of has it."""
    config = config_of(model, run_dir, **changes)
    values = {f"{group}.{key}": getattr(getattr(config, group), key) for group, key in (
        ("model", "path"), ("adapter", "length"), ("adapter", "init_std"), ("adapter", "scope"), ("train", "steps"),
        ("train", "batch_size"), ("train", "decay"), ("train", "learning_rate"), ("train", "eps"),
        ("train", "timesteps"), ("train", "text_penalty"), ("concept", "templates"),
        ("checkpoint", "every"), ("batch", "slots"),
    )}  # fmt: skip
    values |= {"run_dir": run_dir}
    return [
        "batch",
        "--config=configs/mini.py",
        f"--manifest={path}",
        *(f"--config.{k}={v}" for k, v in values.items()),
    ]


def test_killed_and_started_again(tiny_model, tmp_path):
    """At whatever moment it dies, the same command goes on from the last checkpoint."""
    lines = [{**LINES[i], "steps": 12} for i in range(4)]
    path = write(tmp_path / "list.jsonl", lines)
    command_line = flags(tiny_model, tmp_path / "out", path, **{"checkpoint.every": 4})
    process = subprocess.Popen(command(*command_line), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    kept = tmp_path / "out" / "checkpoints" / "0-of-1"
    while not list(kept.glob("[48]")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "out").glob("*/concept.safetensors"))
    clock = max(int(folder.name) for folder in kept.iterdir() if folder.name.isdigit())
    catversion(*command_line)
    assert {entry["status"] for entry in report(tmp_path / "out").values()} == {"done"}
    # 3 slots, 4 concepts of 12 steps: two rounds of 12; the clock begins where it was kept
    assert max(int(folder.name) for folder in kept.iterdir() if folder.name.isdigit()) <= 24
    assert clock >= 4
    assert run(config_of(tiny_model, tmp_path / "whole"), path) == 0
    assert_close(prefixes(tmp_path / "out"), prefixes(tmp_path / "whole"))
    assert "all 4 concepts are done already" in catversion(*command_line).stdout


def test_mistakes_in_the_command(tiny_model, tmp_path):
    path = tmp_path / "list.jsonl"
    command_line = flags(tiny_model, tmp_path / "out", path)
    assert "list.jsonl: cannot be read (No such file or directory); expected a file" in error_of(*command_line)
    path.write_text(json.dumps(LINES[0]) + "\n{")
    assert "list.jsonl:2: not JSON" in error_of(*command_line)
    assert "--manifest: missing" in error_of("batch", "--config=configs/mini.py")
    assert not (tmp_path / "out").exists()


GOOD = json.dumps(LINES[0])
BAD = {
    "": "list.jsonl: no lines; expected an object with id",
    "[1]\n": "list.jsonl:1: Expected `object`, got `array`; expected an object with id (a folder's name",
    '{"id": "a"}': "list.jsonl:1: Object missing required field `dir`; expected an object with id",
    GOOD[:-1] + ', "step": 3}': "list.jsonl:1: Object contains unknown field `step`; expected an object with id",
    GOOD[:-1] + ', "steps": 0}': "list.jsonl:1: Expected `int` >= 1 - at `$.steps`",
    GOOD[:-1] + ', "steps": 4294967296}': "list.jsonl:1: Expected `int` <= 2147483647 - at `$.steps`",
    GOOD[:-1] + ', "seed": true}': "list.jsonl:1: Expected `int | null`, got `bool` - at `$.seed`",
    GOOD[:-1] + ', "seed": 4294967296}': "list.jsonl:1: Expected `int` <= 4294967295 - at `$.seed`",
    GOOD.replace('"a"', '"../a"'): "list.jsonl:1: Expected `str` matching regex '^[A-Za-z0-9]",
    GOOD.replace('"a"', '"a\\n"'): "list.jsonl:1: Expected `str` matching regex '^[A-Za-z0-9]",
    GOOD.replace('"a"', '["a"]'): "list.jsonl:1: Expected `str`, got `array` - at `$.id`",
    GOOD.replace('"a"', '"checkpoints"'): "list.jsonl:1: id 'checkpoints' is the name of one of the batch's own files",
    GOOD.replace('"teapot"', '" "'): "list.jsonl:1: Expected `str` matching regex '\\\\S' - at `$.class_word`",
    GOOD + "\n\n" + GOOD: "list.jsonl:3: id 'a' is also that of line 1; give it another",
    '{"id": "' + "a" * 2**16 + '"}': "list.jsonl:1: not JSON",
    GOOD.replace('"a"', '"\\ud800"'): "list.jsonl:1: Expected `str` matching regex '^[A-Za-z0-9]",
    "[" * 60_000: "list.jsonl:1: ",
    "\x00" * 100: "list.jsonl:1: not JSON",
}


@pytest.mark.parametrize("text", BAD)
def test_mistakes_in_the_manifest(tmp_path, text):
    path = tmp_path / "list.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        list(manifest.read_manifest(path))
    assert BAD[text] in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
def test_a_manifest_is_a_regular_file(tmp_path, kind):
    """Anything else could be without end."""
    path = Path("/dev/zero") if kind == "device" else tmp_path / "list.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match="expected a file with a JSON object a line"):
        list(manifest.read_manifest(path))


def test_a_manifest_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("\ufeff" + GOOD[:-1] + ', "masks": null, "seed": null}')
    (line,) = manifest.read_manifest(path)
    assert (line.id, line.masks, line.seed) == ("a", None, None)


def test_ten_thousand_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({**LINES[0], "id": str(i)}) + "\n" for i in range(10_000)))
    shares = [[line.id for line in Share(Config(), path, Process(i, 3)).lines()] for i in range(3)]
    assert sorted(itertools.chain(*shares), key=int) == [str(i) for i in range(10_000)]
    lines, prepared = manifest.read_manifest(path), []
    queue = Preparation(lambda line: prepared.append(line.id), 8)
    while queue.room:
        queue.add(next(lines))
    job, data = queue.take(wait=True)
    assert (job.id, data.result(), queue.room) == ("0", None, 1)
    queue.close()
    assert len(prepared) <= 8


def test_photos_that_take_their_time_are_not_waited_for():
    """What is not ready is taken later, unless there is nothing else to do."""
    opened, queue = threading.Event(), Preparation(lambda job: opened.wait(60) and job, 2)
    queue.add("slow")
    queue.add("unwanted")
    queue.drop(lambda job: job == "unwanted")
    assert queue.take(wait=False) is None
    opened.set()
    job, data = queue.take(wait=True)
    assert (job, data.result(), queue.take(wait=True)) == ("slow", "slow", None)
    queue.close()
