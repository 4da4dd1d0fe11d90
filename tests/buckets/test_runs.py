"""Whole commands on buckets: trained, killed, resumed, shared, sampled and scored there as on a disk."""

import json
import os
import subprocess
import time

import pytest

from catversion_jax.data import concept_sets
from catversion_jax.methods import concept_file
from catversion_jax.utils.paths import AnyPath, entries, files_below, upload_folder
from tests.commands import ENVIRONMENT, TIMEOUT, catversion, command, error_of
from tests.training.test_many_concepts import LINES

TEAPOT = concept_sets.SHIPPED / "teapot"
STEPS = 16


def train_flags(model: object, run_dir: object, photos: object = TEAPOT / "train", **changes: object) -> list[str]:
    values = {
        "model.path": model, "run_dir": run_dir, "data.dir": photos, "concept.class_word": "teapot",
        "train.steps": STEPS, "train.steps_per_dispatch": 1, "checkpoint.every": 2, "checkpoint.keep": 2,
        "sample.every": 0, "sample.steps": 2,
    }  # fmt: skip
    return ["--config=mini", *(f"--config.{key}={value}" for key, value in (values | changes).items())]


def start(*arguments: object, cwd=None) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def await_checkpoint(process: subprocess.Popen, folder: AnyPath) -> None:
    until = time.monotonic() + TIMEOUT
    while not [path for path in files_below(folder) if path.suffix == ".zip"]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    catversion("train", *train_flags(tiny_model, folder / "run"))
    return folder / "run"


def test_a_killed_run_is_resumed_bit_for_bit(bucket, tiny_model, uninterrupted, tmp_path):
    upload_folder(TEAPOT / "train", bucket / "photos")
    run = bucket / "run"
    flags = train_flags(tiny_model, run, bucket / "photos")
    first = start("train", *flags, cwd=tmp_path)
    await_checkpoint(first, run / "checkpoints")
    first.kill()
    first.communicate()
    again = start("train", *flags, "--resume", cwd=tmp_path)
    _, said = again.communicate(timeout=TIMEOUT)
    assert again.returncode == 0, said
    for name in ("concept.safetensors", "metrics.jsonl", "samples.png", "preview.png"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert sorted(path.name for path, _ in entries(run / "checkpoints")) == [f"{STEPS - 2}.zip", f"{STEPS}.zip"]
    assert len(entries(run / "events")) == 2
    assert list(tmp_path.iterdir()) == [], "nothing beside the process, such as ./gs:/"
    assert "holds a run already" in error_of("train", *flags)


def test_a_damaged_checkpoint_in_a_bucket(gs, tiny_model, uninterrupted):
    """Is set aside, and the one before it goes on."""
    flags = train_flags(tiny_model, gs, **{"train.steps": 6})
    catversion("train", *flags)
    for name in ("concept.safetensors", "samples.png"):
        (gs / name).unlink()
    (gs / "checkpoints" / "6.zip").write_bytes(b"PK\x03\x04 cut")
    done = catversion("train", *flags, "--resume")
    assert "not a readable checkpoint" in done.stderr
    assert "going on from step 4" in done.stderr
    assert {"6.zip", "6.zip.damaged"} <= {path.name for path, _ in entries(gs / "checkpoints")}


def test_two_processes_in_one_bucket(gs, tiny_model, tmp_path):
    """Photos and manifest are in the bucket too; each process learns its share, as on a disk."""
    for line in LINES:
        name = line["dir"].split("/")[0]
        upload_folder(concept_sets.SHIPPED / name, gs / name)
    text = "".join(json.dumps(line | {"steps": 4}) + "\n" for line in LINES)
    (gs / "list.jsonl").write_text(text)
    for name in {line["dir"].split("/")[0] for line in LINES}:
        (tmp_path / name).symlink_to(concept_sets.SHIPPED / name)
    (tmp_path / "list.jsonl").write_text(text)

    def flags(run_dir: object, manifest: object) -> list[str]:
        given = {"batch.slots": 2, "data.dir": "", "concept.class_word": "thing"}
        return ["batch", *train_flags(tiny_model, run_dir, **given), f"--manifest={manifest}"]

    catversion(*flags(tmp_path / "out", tmp_path / "list.jsonl"))
    shared = flags(gs / "out", gs / "list.jsonl")
    processes = [start(*shared, "--num_processes=2", f"--process_id={i}", cwd=tmp_path) for i in range(2)]
    for process in processes:
        _, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, said
    for line in LINES:
        concept = (gs / "out" / line["id"] / concept_file.FILE_NAME).read_bytes()
        assert concept == (tmp_path / "out" / line["id"] / concept_file.FILE_NAME).read_bytes()
        assert (gs / "out" / line["id"] / "preview.png").is_file()
    listed = catversion("status", gs / "out", here=True).stdout
    assert "4 concepts done, 0 failed" in listed
    assert "all 2 concepts are done already" in catversion(*shared, "--num_processes=2", "--process_id=1").stdout
    assert not (tmp_path / "gs:").exists()


def test_a_folder_in_use_is_left_alone(gs, tiny_model):
    """By a run, and by a process of the same number of a batch."""
    flags = train_flags(tiny_model, gs, **{"train.steps": 10**6})
    first = start("train", *flags)
    await_checkpoint(first, gs / "checkpoints")
    second = catversion("train", *flags, "--resume", status=1, here=False)
    assert "another process trains here (claim run); wait for it, or choose another run_dir" in second.stderr
    first.terminate()
    first.communicate(timeout=TIMEOUT)
    assert first.returncode == 143


def test_models_concepts_prompts_and_pictures(bucket, tiny_model, tmp_path, monkeypatch):
    """Everything that generate and evaluate take and write may be in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    upload_folder(tiny_model, bucket / "model")
    upload_folder(TEAPOT / "heldout", bucket / "heldout")
    upload_folder(TEAPOT / "heldout_masks", bucket / "masks")
    catversion("train", *train_flags(bucket / "model", bucket / "run", **{"train.steps": 2}), here=True)
    (bucket / "prompts.txt").write_text("a teapot\na red teapot\n")
    given = [f"--embedding={bucket / 'run'}", f"--prompts_file={bucket / 'prompts.txt'}", "--num=1", "--steps=2"]
    catversion("generate", *given, f"--out={bucket / 'pictures'}")
    catversion("generate", *given, f"--out={tmp_path / 'pictures'}")
    names = [path.name for path, _ in entries(bucket / "pictures") if not path.name.startswith(".")]
    assert [name.split("_")[0] for name in names] == ["a-red-teapot", "a-teapot", "grid.png"]
    for name in names:
        assert (bucket / "pictures" / name).read_bytes() == (tmp_path / "pictures" / name).read_bytes()
    photos = [f"--references={bucket / 'heldout'}", f"--masks={bucket / 'masks'}"]
    catversion(
        "evaluate", f"--images={bucket / 'pictures'}", *photos, "--prompt=a teapot", "--prompt=a red teapot",
        f"--out={bucket / 'scores.json'}",
    )  # fmt: skip
    catversion("export", f"--embedding={bucket / 'run'}", f"--out={bucket / 'exported'}")
    assert (bucket / "exported" / "ComfyUI" / "custom_nodes" / "catversion" / "__init__.py").is_file()
    # The model is copied once, and again when it is another.
    cached = next((tmp_path / "cache" / "catversion_jax" / "models").iterdir())
    before = (cached / "unet" / "config.json").stat().st_mtime_ns
    catversion("generate", *given, f"--out={tmp_path / 'again'}")
    assert (cached / "unet" / "config.json").stat().st_mtime_ns == before
    (bucket / "model" / "unet" / "config.json").write_text("{}")
    assert "the UNet takes text states of 1280 channels" in error_of("generate", *given)


def test_compiled_programs_in_a_bucket(gs, tiny_model):
    """JAX takes the URL itself."""
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(gs / "cache")}
    run = command("train", *train_flags(tiny_model, gs / "run", **{"train.steps": 2}))
    subprocess.run(run, env=environment, check=True, capture_output=True, timeout=TIMEOUT)
    assert any(path.name.startswith("jit_") for path in files_below(gs / "cache"))
    assert not os.path.exists("gs:")
