"""What a user sees: the commands end to end on a tiny model, and each mistake in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from catversion_jax.cli.main import COMMANDS
from catversion_jax.config import Config
from catversion_jax.methods import concept_file
from catversion_jax.utils.image_grid import CELL, GAP, LABEL_WIDTH
from catversion_jax.utils.settings import flatten
from tests import tiny
from tests.commands import ENVIRONMENT, ROOT, catversion, command, error_of, run_here

STEPS = 12
TEAPOT = ROOT / "catversion_jax" / "concepts" / "teapot"
PICTURE = b"\x89PNG\r\n\x1a\n"


def train_flags(model: Path, run_dir: Path, **changes) -> list[str]:
    """A run of a few seconds; changes are config keys with _ for dots where the key has one."""
    config = {
        "model.path": model,
        "run_dir": run_dir,
        "data.dir": TEAPOT / "train",
        "data.masks_dir": TEAPOT / "train_masks",
        "concept.class_word": "teapot",
        "adapter.length": 2,
        "train.steps": STEPS,
        "train.decay": "cosine",
        "checkpoint.every": 4,
        "sample.every": 6,
        "sample.steps": 2,
        "sample.prompts": "'a photo of {concept} on the beach','a photo of a blue {class_word}'",
    } | changes
    return ["train", "--config=configs/mini.py", *(f"--config.{key}={value}" for key, value in config.items())]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """An uninterrupted run's folder."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    done = catversion(*train_flags(tiny_model, run_dir))
    assert str(run_dir / "samples.png") in done.stdout
    assert f"{STEPS}/{STEPS}" in done.stderr
    return run_dir


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def event_tags(run_dir: Path) -> set[str]:
    """The tags in the event files, read by the format's own definition: length, checksum, record, checksum."""
    tags = set()
    for path in (run_dir / "events").iterdir():
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            tags |= {value.tag for value in event.summary.value}
            data = data[16 + size :]
    return tags


def test_a_run_leaves_what_it_promises(finished):
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "checkpoints", "concept.safetensors", "config.json", "data", "events", "metrics.jsonl", "samples.png",
        "preview.png", "status.json",
    }  # fmt: skip
    status = json.loads((finished / "status.json").read_text())
    assert {key: status[key] for key in ("status", "photos", "steps")} == {
        "status": "done",
        "photos": 5,
        "steps": STEPS,
    }
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [4, 8, 12]
    rows = metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["learning_rate"] > rows[-1]["learning_rate"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert {"loss", "learning_rate", "grad_norm", "validation"} <= event_tags(finished)
    assert list((finished / "data").rglob("*.array_record*"))
    concept = concept_file.load(finished)
    assert concept.learned["prefix"].shape == (2, 3, 2, 2, 16)
    assert (concept.class_word, concept.method.layers, concept.steps) == ("teapot", ((1, 2, 3),), STEPS)
    assert Image.open(finished / "samples.png").width > 2 * 128


def test_a_finished_run_stays_as_it_is(finished, tiny_model):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert "holds a run already; resume it, or choose another run_dir" in error_of(*train_flags(tiny_model, finished))
    assert "finished already" in catversion(*train_flags(tiny_model, finished), "--resume").stdout
    other = train_flags(tiny_model, finished, **{"train.steps": 13, "seed": 3})
    assert "seed: 0 there, 3 here; train.steps: 12 there, 13 here" in error_of(*other, "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def interrupt(arguments: list[str], run_dir: Path, number: int, after: int) -> int:
    """Start, send the signal once `after` steps are written, and return the exit status."""
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        path = run_dir / "metrics.jsonl"
        while process.poll() is None and not (path.is_file() and len(path.read_text().splitlines()) >= after):
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(60)


def same_result(run_dir: Path, reference: Path) -> None:
    """Bit for bit: what was learned, every loss on the way, and the pictures drawn with it."""
    ours, theirs = vars(concept_file.load(run_dir)).copy(), vars(concept_file.load(reference)).copy()
    np.testing.assert_array_equal(ours.pop("learned")["prefix"], theirs.pop("learned")["prefix"])
    assert ours == theirs
    assert (run_dir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert (run_dir / "samples.png").read_bytes() == (reference / "samples.png").read_bytes()


def test_killed_and_resumed_equals_uninterrupted(finished, tiny_model, tmp_path):
    arguments = train_flags(tiny_model, tmp_path / "killed")
    after = int(np.random.default_rng().integers(1, STEPS))
    print(f"killed after step {after}")
    assert interrupt(arguments, tmp_path / "killed", signal.SIGKILL, after) == -signal.SIGKILL
    catversion(*arguments, "--resume")
    same_result(tmp_path / "killed", finished)


def test_sigterm_saves_and_resumes(finished, tiny_model, tmp_path):
    """The photos may be gone by then: a run keeps its own."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (TEAPOT / "train").iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    changes = {"data.dir": photos, "checkpoint.every": 1000}
    arguments = train_flags(tiny_model, tmp_path / "run", **changes)
    assert interrupt(arguments, tmp_path / "run", signal.SIGTERM, 5) == 128 + signal.SIGTERM
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 5 <= int(saved.name) < STEPS
    assert len(metrics(tmp_path / "run")) == int(saved.name)
    for path in photos.iterdir():
        path.unlink()
    catversion(*arguments, "--resume")
    resumed, unbroken = (concept_file.load(path).learned["prefix"] for path in (tmp_path / "run", finished))
    np.testing.assert_array_equal(resumed, unbroken)


def test_not_finite(tiny_model, tmp_path):
    message = error_of(*train_flags(tiny_model, tmp_path / "run", **{"adapter.init_std": 1e30, "sample.every": 0}))
    assert "loss or gradient not finite after step 0; check the photos, the base model's weights and" in message
    assert f"; the last good state is in {tmp_path}/run/checkpoints/0" in message
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()
    assert not (tmp_path / "run" / "concept.safetensors").exists()


def test_a_full_disk(tiny_model, tmp_path):
    """The run stops with one line, and continues once there is room."""
    arguments = train_flags(tiny_model, tmp_path / "run", **{"sample.every": 0})
    message = error_of(*arguments, full_disk=True, status=74)
    assert "could not" in message
    assert str(tmp_path / "run") in message
    catversion(*arguments, "--resume")
    assert concept_file.load(tmp_path / "run").steps == STEPS


def test_a_full_disk_for_pictures(finished, tmp_path):
    """What draws pictures says which one it could not write, and leaves no half of it."""
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, run_dir], check=True)
    message = error_of(
        "generate",
        f"--embedding={run_dir}",
        "--prompt=a teapot",
        "--steps=1",
        f"--out={tmp_path}",
        full_disk=True,
        status=74,
    )
    assert f"{tmp_path}/grid.png: File too large; fix that and run the command again" in message
    assert not (tmp_path / "grid.png").exists()
    assert list(tmp_path.glob("a-teapot_*.png"))


def without_results(finished: Path, run_dir: Path) -> None:
    """A copy of a finished run that has to go on from its checkpoints."""
    subprocess.run(["cp", "-r", finished, run_dir], check=True)
    for name in ("concept.safetensors", "samples.png"):
        (run_dir / name).unlink()


def test_a_full_disk_for_checkpoints(finished, tiny_model, tmp_path):
    """One line, however many threads were writing at that moment."""
    run_dir = tmp_path / "run"
    without_results(finished, run_dir)
    subprocess.run(["rm", "-r", run_dir / "checkpoints"], check=True)
    done = catversion(*train_flags(tiny_model, run_dir), "--resume", full_disk=True, status=74)
    # Beside the progress bar, and JAX's own about its cache of compiled programs.
    others = ("steps/s", "s/ steps", "persistent compilation cache", "warnings.warn(")
    lines = [line for line in done.stderr.splitlines() if line and not any(word in line for word in others)]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"catversion: error: {run_dir}/checkpoints")
    assert "; make room, or mend the disk, and resume" in lines[0]


def test_a_damaged_checkpoint(finished, tiny_model, tmp_path):
    """The run goes on from the one before, and ends with the same numbers; with none that is readable it says so."""
    run_dir = tmp_path / "run"
    without_results(finished, run_dir)
    damaged = run_dir / "checkpoints" / "12"
    for path in (damaged / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    done = catversion(*train_flags(tiny_model, run_dir), "--resume")
    (line,) = [line for line in done.stderr.splitlines() if "warning" in line]
    assert f"catversion: warning: {damaged}: not a readable checkpoint" in line
    assert "going on from step 8" in line
    same_result(run_dir, finished)
    (run_dir / "concept.safetensors").unlink()
    for path in (run_dir / "checkpoints").glob("*/config/metadata"):
        path.write_text("[]")
    assert "no older one is readable; restore the folder from a copy, or remove it to begin at step 0" in error_of(
        *train_flags(tiny_model, run_dir), "--resume"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.stps": 5}, "config.train.stps: no such key; did you mean train.steps?"),
        ({"train.steps": "many"}, "--config.train.steps=many"),
        ({"train.steps": 0}, "config.train.steps=0: expected 1 to 2147483647"),
        ({"data.dir": "nowhere"}, "nowhere: no such folder; data.dir takes"),
        ({"concept.class_word": ""}, "config.concept.class_word='': expected the base class"),
        ({"model.path": "nowhere"}, "nowhere: not found; expected a folder, a file or a model's name"),
        ({"adapter.layers": "3,4"}, "config.adapter.layers (3, 4): expected distinct indices into 4"),
        ({"adapter.scope": "none"}, "config.adapter.scope='none': expected one of all, trigger"),
        ({"sample.prompts": "'a {thing}','b'"}, "prompt template 'a {thing}': the only fields are"),
        ({"sample.prompts": "()"}, "config.sample.prompts=(): expected at least one prompt"),
    ],
)
def test_mistakes_in_the_config(tiny_model, tmp_path, changes, expected):
    assert expected in error_of(*train_flags(tiny_model, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_bad_photo_is_named_before_anything_is_written(tiny_model, tmp_path):
    (tmp_path / "photos").mkdir()
    bad = tmp_path / "photos" / "holiday.jpg"
    bad.write_bytes(b"not a picture")
    message = error_of(
        *train_flags(tiny_model, tmp_path / "run", **{"data.dir": tmp_path / "photos", "data.masks_dir": ""})
    )
    assert f"{bad}: not a JPEG, PNG, WEBP, HEIC or AVIF image" in message
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_command():
    assert "trian: no such command; did you mean train?" in error_of("trian")
    assert "--config: missing" in error_of("train")
    assert "nope.py: no such config file" in error_of("train", "--config=nope.py")
    assert "Unknown command line flag 'resum'" in error_of("train", "--config=configs/mini.py", "--resum")
    assert "--embedding: missing" in error_of("generate")
    assert "train " in catversion().stdout
    assert "--embedding" in catversion("generate", "--help").stdout


def test_debug_shows_where_an_error_comes_from():
    done = run_here(("generate", "--embedding=nowhere", "--prompt=a", "--debug"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("catversion: error: nowhere: not found")


def test_a_reader_that_has_gone():
    """Such as head. Not an error, and nothing is said about it."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command("train", "--help"), cwd=ROOT, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, timeout=100
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


TAKES_CONFIG = {"train", "prepare", "serve", "batch", "sweep", "study", "bench", "ui"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_all(name):
    """Every flag that the command defines and, with a config, every key, each with a sentence."""
    text = catversion(name, "--help", here=True).stdout
    assert text.startswith(f"catversion {name}")
    assert "--debug  Show the traceback" in text
    assert ("--config  " in text) == (name in TAKES_CONFIG)
    for key, field, _ in flatten(Config()) if name in TAKES_CONFIG else ():
        assert f"  {key}  {field.metadata['help'].split()[0]}" in text
    assert "repeat this option" not in text
    assert str(ROOT) not in text


def test_a_concepts_own_sampler(finished, tmp_path):
    """Without flags, an image is sampled as those of the run's grid are, and is the same one."""
    prompt = "a photo of a teapot on the beach"
    catversion("generate", "--embedding", finished, f"--prompt={prompt}", "--num=1", f"--out={tmp_path}", here=False)
    (path,) = tmp_path.glob("a-photo-of-a-teapot-on-the-beach_*_0.png")
    image = Image.open(path).resize((CELL, CELL), Image.Resampling.BICUBIC)
    grid = np.asarray(Image.open(finished / "samples.png"))
    cells = np.lib.stride_tricks.sliding_window_view(grid[-CELL - GAP :], (CELL, CELL, 3))[:, LABEL_WIDTH, 0]
    assert min(np.abs(cell.astype(int) - np.asarray(image)).max() for cell in cells) == 0


def pictures(folder: Path) -> dict[str, bytes]:
    """By their names without keys, each of which names one picture here."""
    found = [path for path in folder.glob("*_[0-9].png") if not path.name.startswith("grid")]
    named = {re.sub(r"_[0-9a-f]{8}_", "_", path.name): path.read_bytes() for path in found}
    assert len(named) == len(found)
    return named


def test_generate(finished, tmp_path):
    """Pictures by prompt and seed; a second call adds; strength 0 is the base model."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a teapot!\n\na red teapot\n")
    out = tmp_path / "out"
    same = ["--embedding", finished, "--steps=2", f"--out={out}"]
    done = catversion(
        "generate", *same, "--prompt=A photo of a teapot on the beach", f"--prompts_file={prompts}", "--num=2"
    )
    assert "catversion: warning" not in done.stderr
    first = pictures(out)
    slugs = ("a-photo-of-a-teapot-on-the-beach", "a-photo-of-a-teapot", "a-red-teapot")
    assert first.keys() == {f"{slug}_{seed}.png" for slug in slugs for seed in (0, 1)}
    assert all(data.startswith(PICTURE) for data in first.values())

    catversion("generate", *same, "--prompt=a red teapot", "--num=3", "--seed=1")
    second = pictures(out)
    assert second.keys() - first.keys() == {"a-red-teapot_2.png", "a-red-teapot_3.png"}
    assert first.items() <= second.items()  # the same prompt and seed give the same picture in any call
    assert {path.name for path in out.glob("grid*")} == {"grid.png", "grid_1.png"}

    same[-1] = f"--out={tmp_path / 'base'}"
    done = catversion("generate", *same, "--prompt=a red teapot", "--num=1", "--strength=0")
    assert done.stderr.count("warning: strength=0 removes the concept") == 1
    base = pictures(tmp_path / "base")
    assert base.keys() == {"a-red-teapot_0.png"}
    assert base["a-red-teapot_0.png"] != first["a-red-teapot_0.png"]

    done = catversion("generate", *same, "--prompt=a car", "--num=1")
    assert done.stderr.count("warning: without the class word 'teapot'") == 1
    assert "a-car_0.png" in pictures(tmp_path / "base")


def test_generate_refuses(finished, tiny_model, tmp_path):
    prompt = "--prompt=a teapot"
    assert "not found; expected a learned concept" in error_of("generate", "--embedding", tmp_path, prompt)
    assert "--prompt: missing" in error_of("generate", "--embedding", finished)
    other = tiny.write(tmp_path / "other", seed=1)
    message = error_of("generate", "--embedding", finished, prompt, f"--model={other}")
    assert "learned in text encoder" in message
    assert str(other) in message
    nowhere = f"--prompts_file={tmp_path / 'nowhere.txt'}"
    assert "No such file" in error_of("generate", "--embedding", finished, nowhere)


def test_doctor_shows_cache_hits(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    reports = []
    for _ in range(2):
        out = tmp_path / "out"
        arguments = ["--embedding", finished, "--prompt=a teapot", "--num=1", "--steps=2", "--out", out]
        catversion("generate", *arguments, here=False)
        reports.append(catversion("doctor").stdout)
    first, second = (next(line for line in report.splitlines() if "last:" in line) for report in reports)
    assert first.startswith("  last: 0 hits")
    assert int(second.split()[1]) >= 2
    assert second.endswith(" 0 misses")
    for part in (
        "versions:",
        "jax ",
        "devices:",
        "cpu 0",
        "GiB available",
        str(tmp_path / "cache"),
        "missing:\n  nothing",
    ):
        assert part in reports[1]


def test_sweep(tiny_model, tmp_path):
    """On a concept of the shipped ones' layout; the tiny model has no image encoder, so the mini one is lent to it."""
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", tiny_model, model], check=True)
    mini = ROOT / "catversion_jax" / "mini"
    os.symlink(mini / "world.json", model / "world.json")
    os.symlink(mini / "image_encoder", model / "image_encoder")
    concepts = tmp_path / "concepts"
    concepts.mkdir()
    # Without masks, which a user's folders rarely have.
    (concepts / "teapot").mkdir()
    for name in ("concept.json", "train", "heldout"):
        os.symlink(TEAPOT / name, concepts / "teapot" / name)
    arguments = [
        "sweep", "--config=configs/mini.py", f"--config.model.path={model}", "--config.train.steps=2",
        "--config.sample.steps=2", "--config.sample.every=0", f"--concepts={concepts}", f"--out={tmp_path / 'out'}",
        "--seeds=1", "--prompts=2", "--try=adapter.length=1;train.learning_rate=0.5",
    ]  # fmt: skip
    catversion(*arguments)
    (score,) = map(json.loads, (tmp_path / "out" / "scores.jsonl").read_text().splitlines())
    assert score["concept"] == "teapot"
    assert score["heldout_loss"] != score["heldout_loss_base"]
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    assert "adapter.length=1;train.learning_rate=0.5 | teapot |" in catversion(*arguments).stdout
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before
    refused = error_of(*arguments, "--prompts=1")
    assert "out: belongs to another config (prompts: 2 there, 1 here); give the same one, or another folder" in refused
    assert "nowhere: no concepts" in error_of(*arguments[:2], "--concepts=nowhere")


def test_every_module_imports_without_torch_and_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "catversion_jax").rglob("*.py")
        if (path.parent / "__init__.py").is_file()  # else it is data, for others to import
    ]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    script = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tensorflow", "diffusers"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
